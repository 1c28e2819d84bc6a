// main() for compilers without libFuzzer: every file named, and `-mutations=N` seeded changes of them, through the same
// entry.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;

Bytes changed(const std::vector<Bytes>& seeds, std::mt19937_64& dice) {
    Bytes bytes = seeds[dice() % seeds.size()];
    for (uint64_t count = 1 + dice() % 4; count; --count) {
        const size_t place = bytes.empty() ? 0 : dice() % bytes.size();
        switch (dice() % 5) {
            case 0:
                if (!bytes.empty()) bytes[place] ^= static_cast<uint8_t>(1u << dice() % 8);
                break;
            case 1:
                if (!bytes.empty()) bytes[place] = static_cast<uint8_t>(dice());
                break;
            case 2:
                bytes.resize(place);
                break;
            case 3:
                bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(place), static_cast<uint8_t>(dice()));
                break;
            default: {
                const Bytes& other = seeds[dice() % seeds.size()];
                bytes.insert(bytes.end(),
                             other.begin() + static_cast<std::ptrdiff_t>(other.empty() ? 0 : dice() % other.size()),
                             other.end());
            }
        }
    }
    return bytes;
}

}  // namespace

int main(int count, char** arguments) {
    std::vector<Bytes> seeds;
    uint64_t mutations = 0;
    for (int k = 1; k < count; ++k) {
        const std::string argument = arguments[k];
        if (argument.rfind("-mutations=", 0) == 0) {
            mutations = std::stoull(argument.substr(11));
            continue;
        }
        std::ifstream file(argument, std::ios::binary);
        seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
    if (seeds.empty()) {
        std::fprintf(stderr, "replay: no file was named\n");
        return 2;
    }
    for (const Bytes& seed : seeds) LLVMFuzzerTestOneInput(seed.data(), seed.size());
    std::mt19937_64 dice(0);
    for (uint64_t k = 0; k < mutations; ++k) {
        const Bytes bytes = changed(seeds, dice);
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
    std::printf("%zu files and %llu changes of them, nothing found\n", seeds.size(),
                static_cast<unsigned long long>(mutations));
    return 0;
}
