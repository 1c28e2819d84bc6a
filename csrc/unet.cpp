#include "unet.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "check.h"
#include "depth_head.h"
#include "network_ops.h"
#include "sharing.h"
#include "timing.h"

namespace datasetdm {
namespace {

constexpr int64_t kHalves = 2;  // of a batch: without and with the text

struct Image {
    float* data;
    int64_t count, channels, height, width;

    int64_t cells() const { return height * width; }
    int64_t size() const { return count * cells() * channels; }
    float* of(int64_t image) const {
        return data + image % count * cells() * channels;
    }  // without and with the text share one image while they are equal
};

uintptr_t place(const float* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

float* scratch(int64_t count) {
    static thread_local KeptFloats kept;
    return kept.of(count);
}

// What is done with some images, and over how many cells.
struct Stage {
    int64_t cells;
    std::function<void(int64_t first, int64_t count, int64_t threads)> work;
};

// Works every stage for `images`, of which `apart` lie side by side; beyond them another half begins.
void work_through(const std::vector<Stage>& stages, int64_t images, int64_t apart, int64_t threads) {
    const auto in_halves = [&](const Stage& stage, int64_t first, int64_t count, int64_t within) {
        const int64_t before = std::clamp<int64_t>(apart - first, 0, count);
        if (before) stage.work(first, before, within);
        if (before < count) stage.work(first + before, count - before, within);
    };
    if (images < threads) {
        for (const Stage& stage : stages)
            share_images(images, stage.cells, threads,
                         [&](int64_t first, int64_t count, int64_t within) { in_halves(stage, first, count, within); });
        return;
    }
    share(images, threads, [&](int64_t first, int64_t last) {
        for (const Stage& stage : stages) {
            const int64_t step = images_at_once(stage.cells);
            for (int64_t image = first; image < last; image += step)
                in_halves(stage, image, std::min(step, last - image), 1);
        }
    });
}

// The last output beside the kept one, cell by cell.
const float* joined(const Image& x, const Image& skip, int64_t first, int64_t count) {
    const Timed timed(Work::layout);
    float *both = scratch(count * x.cells() * (x.channels + skip.channels)), *next = both;
    for (int64_t image = first; image < first + count; ++image) {
        const float *own = x.of(image), *kept = skip.of(image);
        for (int64_t cell = 0; cell < x.cells();
             ++cell, own += x.channels, kept += skip.channels, next += x.channels + skip.channels) {
            std::memcpy(next, own, x.channels * sizeof(float));
            std::memcpy(next + x.channels, kept, skip.channels * sizeof(float));
        }
    }
    return both;
}

int64_t inputs_of(const Step& step) {
    return std::visit(
        [](const auto& block) -> int64_t {
            using Block = std::decay_t<decltype(block)>;
            if constexpr (std::is_same_v<Block, Convolution>) return block.channels;
            if constexpr (std::is_same_v<Block, Upsample>) return block.convolution.channels;
            if constexpr (std::is_same_v<Block, Resnet>) return block.conv1.channels;
            if constexpr (std::is_same_v<Block, Transformer>) return block.norm.channels;
        },
        step.block);
}

Image result_of(const Step& step, const Image& x) {
    return std::visit(
        [&](const auto& block) -> Image {
            using Block = std::decay_t<decltype(block)>;
            const int64_t count = step.parts ? kHalves * x.count : x.count;
            if constexpr (std::is_same_v<Block, Convolution>)
                return {nullptr, count, block.product.outputs, block.side(x.height), block.side(x.width)};
            if constexpr (std::is_same_v<Block, Upsample>)
                return {nullptr, count, block.convolution.product.outputs, 2 * x.height, 2 * x.width};
            if constexpr (std::is_same_v<Block, Resnet>)
                return {nullptr, count, block.conv2.product.outputs, x.height, x.width};
            if constexpr (std::is_same_v<Block, Transformer>)
                return {nullptr, count, block.norm.channels, x.height, x.width};
        },
        step.block);
}

// A bump allocator over the memory that a thread keeps: the first pass measures, the second assigns.
class Memory {
public:
    explicit Memory(float* start) : start_(start) {}
    float* take(int64_t count) {
        used_ += count;
        return start_ ? start_ + used_ - count : nullptr;
    }
    int64_t used() const { return used_; }

private:
    float* start_;
    int64_t used_ = 0;
};

struct Call {
    uintptr_t latents, biases;
    const std::vector<uintptr_t>& texts;
    uintptr_t out;
    const std::vector<uintptr_t>&outputs, &queries;
    int64_t images, height, width, tokens, vector_bytes;
};

float* at(uintptr_t pointer) { return reinterpret_cast<float*>(pointer); }

// The stages of a call, before and after the halves of the batch part.
class Plan {
public:
    std::vector<Stage> before, after;

    Plan(const UNet& unet, const Call& call, Memory& memory) : call_(call), memory_(memory), bias_(at(call.biases)) {
        const Image latents{at(call.latents), call.images, unet.entry.channels, call.height, call.width};
        const Image entered{nullptr, call.images, unet.entry.product.outputs, unet.entry.side(call.height),
                            unet.entry.side(call.width)};
        Image x = add(unet.entry, latents, given(0, entered));
        std::vector<Image> kept{x};
        for (size_t i = 0; i < unet.steps.size(); ++i) {
            const Step& step = unet.steps[i];
            const Image y = given(i + 1, result_of(step, x));
            if (step.joins) {
                require(kept.back().height == x.height && kept.back().width == x.width, "unet: ", call.height, " x ",
                        call.width, " cells do not halve and double to the same sides");
                x = add(std::get<Resnet>(step.block), x, y, &kept.back());
                kept.pop_back();
            } else {
                x = std::visit([&](const auto& block) { return add(block, x, y); }, step.block);
            }
            if (step.keeps) kept.push_back(x);
        }
        add_exit(unet, x);
    }

private:
    // `x` with memory of its own, or where the caller wants to have it.
    Image given(size_t place, Image x) {
        x.data = call_.outputs.empty() || !call_.outputs[place] ? memory_.take(x.size()) : at(call_.outputs[place]);
        return x;
    }

    // Adds a stage whose work is told what part of `x` it is for.
    template <typename Work>
    void stage(const Image& x, int64_t cells, const Work& work) {
        const int64_t of = is_parted_ ? kHalves * call_.images : call_.images;
        const auto part = [of, height = x.height, width = x.width, vector_bytes = call_.vector_bytes](int64_t count,
                                                                                                      int64_t threads) {
            return Part{of, count, height, width, threads, vector_bytes};
        };
        (is_parted_ ? after : before).push_back({cells, [=](int64_t first, int64_t count, int64_t threads) {
                                                     work(first, part(count, threads));
                                                 }});
    }

    Image add(const Convolution& block, const Image& x, const Image& y) {
        stage(x, x.cells(), [=, &block](int64_t first, const Part& part) {
            block.on(part, x.of(first), block.product.bias, nullptr, y.of(first));
        });
        return y;
    }

    Image add(const Upsample& block, const Image& x, const Image& y) {
        stage(x, y.cells(), [=, &block](int64_t first, const Part& part) { block.on(part, x.of(first), y.of(first)); });
        return y;
    }

    Image add(const Resnet& block, const Image& x, const Image& y, const Image* kept = nullptr) {
        const Image skip = kept ? *kept : Image{};
        stage(x, x.cells(), [=, &block, bias = bias_, joins = kept != nullptr](int64_t first, const Part& part) {
            block.on(part, joins ? joined(x, skip, first, part.count) : x.of(first), bias, y.of(first));
        });
        bias_ += block.conv1.product.outputs;
        return y;
    }

    Image add(const Transformer& block, const Image& x, const Image& y) {
        const int64_t inner = block.entry.product.outputs, heads = block.heads, head = inner / heads, cells = x.cells(),
                      tokens = call_.tokens;
        const Image hidden{memory_.take(x.count * cells * inner), x.count, inner, x.height, x.width};
        const Image query{call_.queries.empty() ? memory_.take(hidden.size()) : at(call_.queries[text_]), x.count,
                          inner, x.height, x.width};
        const Image attended{memory_.take(y.count * cells * inner), y.count, inner, x.height, x.width};
        const float *keys = at(call_.texts[text_++]), *values = keys + kHalves * call_.images * tokens * inner;
        stage(x, cells, [=, &block](int64_t first, const Part& part) {
            block.before(part, x.of(first), hidden.of(first), query.of(first));
        });
        is_parted_ = is_parted_ || x.count < y.count;
        stage(x, cells, [=, &block](int64_t first, const Part& part) {
            const std::vector<int64_t> rows{cells * inner, head, inner}, columns{tokens * inner, tokens * head, head};
            const int64_t start = first * tokens * inner;
            attention_cpu(block.entry.product.storage(), place(query.of(first)), rows, place(keys + start), columns,
                          place(values + start), columns, place(attended.of(first)), rows, part.count, heads, cells,
                          tokens, head, 1 / std::sqrt(static_cast<double>(head)), part.threads, part.vector_bytes);
            block.after(part, x.of(first), hidden.of(first), attended.of(first), y.of(first));
        });
        return y;
    }

    void add_exit(const UNet& unet, const Image& x) {
        stage(x, x.cells(), [=, &unet, out = at(call_.out)](int64_t first, const Part& part) {
            float* normed = scratch(part.rows() * x.channels);
            normalise(unet.norm, true, x.of(first), normed, part.count, x.cells(), part.threads, part.vector_bytes);
            unet.exit.on(part, normed, unet.exit.product.bias, nullptr,
                         out + first * x.cells() * unet.exit.product.outputs);
        });
    }

    const Call& call_;
    Memory& memory_;
    const float* bias_;
    size_t text_ = 0;
    bool is_parted_ = false;
};

}  // namespace

UNet::UNet(const Convolution& entry, const std::vector<Step>& steps, const Norm& norm, const Convolution& exit)
    : entry(entry), steps(steps), norm(norm), exit(exit) {
    std::vector<int64_t> kept{entry.product.outputs};
    int64_t channels = entry.product.outputs, parting = 0;
    for (const Step& step : steps) {
        if (step.joins) {
            require(!kept.empty(), "unet: more steps join an earlier output than are kept");
            channels += kept.back();
            kept.pop_back();
        }
        require(!step.joins || std::holds_alternative<Resnet>(step.block),
                "unet: only a resnet joins an earlier output");
        require(!step.parts || std::holds_alternative<Transformer>(step.block), "unet: halves part in a transformer");
        require(inputs_of(step) == channels, "unet: a step of ", inputs_of(step), " channels reads ", channels);
        channels = result_of(step, {nullptr, 1, channels, 1, 1}).channels;
        if (step.keeps) kept.push_back(channels);
        parting += step.parts;
    }
    require(parting == 1, "unet: halves part in ", parting, " steps, expected 1");
    require(norm.channels == channels && exit.channels == channels, "unet: the last norm and convolution are of ",
            norm.channels, " and ", exit.channels, " channels, expected ", channels);
}

std::vector<std::array<int64_t, 3>> UNet::sizes(int64_t height, int64_t width) const {
    Image x{nullptr, 1, entry.product.outputs, entry.side(height), entry.side(width)};
    std::vector<std::array<int64_t, 3>> found;
    for (const Step& step : steps) {
        found.push_back({x.channels, x.height, x.width});
        x = result_of(step, x);
    }
    found.push_back({x.channels, x.height, x.width});
    return found;
}

void UNet::run(uintptr_t latents, uintptr_t biases, const std::vector<uintptr_t>& texts, uintptr_t out,
               const std::vector<uintptr_t>& outputs, const std::vector<uintptr_t>& queries, int64_t images,
               int64_t height, int64_t width, int64_t tokens, int64_t threads, int64_t vector_bytes) const {
    vector_bytes = chosen_vector_bytes("unet", vector_bytes);
    const int64_t transformers = std::count_if(
        steps.begin(), steps.end(), [](const Step& step) { return std::holds_alternative<Transformer>(step.block); });
    require(latents && biases && out, "unet: a pointer is null; pass data_ptr() of a CPU tensor");
    require(images > 0 && height > 0 && width > 0 && tokens > 0 && threads > 0, "unet: ", images, " images of ", height,
            " x ", width, " cells, ", tokens, " tokens, ", threads, " threads; expected at least 1 of each");
    require(static_cast<int64_t>(texts.size()) == transformers, "unet: ", texts.size(), " texts for ", transformers,
            " transformers");
    require(outputs.empty() || outputs.size() == steps.size() + 1, "unet: ", outputs.size(),
            " outputs for an entry and ", steps.size(), " steps");
    require(queries.empty() || static_cast<int64_t>(queries.size()) == transformers, "unet: ", queries.size(),
            " queries for ", transformers, " transformers");
    static thread_local KeptFloats arena;
    const Call call{latents, biases, texts, out, outputs, queries, images, height, width, tokens, vector_bytes};
    Memory counted(nullptr);
    Plan(*this, call, counted);
    Memory memory(arena.of(counted.used()));
    const Plan plan(*this, call, memory);
    work_through(plan.before, images, images, threads);
    work_through(plan.after, kHalves * images, images, threads);
}

}  // namespace datasetdm
