#include "unet.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "check.h"
#include "depth_head.h"
#include "network_ops.h"
#include "sharing.h"

namespace datasetdm {
namespace {

constexpr int64_t kFp32 = 0;
constexpr int64_t kHalves = 2;  // of a batch: without and with the text

struct Image {
    float* data;
    int64_t count, channels, height, width;

    int64_t cells() const { return height * width; }
    int64_t size() const { return count * cells() * channels; }
    float* of(int64_t image) const { return data + image % count * cells() * channels; }  // the halves are one while they are equal
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

// Calls every stage for `images` of which `apart` lie side by side; beyond them another half begins.
void call(const std::vector<Stage>& stages, int64_t images, int64_t apart, int64_t threads) {
    const auto in_halves = [&](const Stage& stage, int64_t first, int64_t count, int64_t within) {
        const int64_t before = std::clamp<int64_t>(apart - first, 0, count);
        if (before) stage.work(first, before, within);
        if (before < count) stage.work(first + before, count - before, within);
    };
    if (images < threads) {
        for (const Stage& stage : stages)
            share_images(images, stage.cells, threads, [&](int64_t first, int64_t count, int64_t within) { in_halves(stage, first, count, within); });
        return;
    }
    share(images, threads, [&](int64_t first, int64_t last) {
        for (const Stage& stage : stages) {
            const int64_t step = images_at_once(stage.cells);
            for (int64_t image = first; image < last; image += step) in_halves(stage, image, std::min(step, last - image), 1);
        }
    });
}

// The last output beside the kept one, cell by cell.
const float* joined(const Image& x, const Image& skip, int64_t first, int64_t count) {
    float *both = scratch(count * x.cells() * (x.channels + skip.channels)), *next = both;
    for (int64_t image = first; image < first + count; ++image) {
        const float *own = x.of(image), *kept = skip.of(image);
        for (int64_t cell = 0; cell < x.cells(); ++cell, own += x.channels, kept += skip.channels, next += x.channels + skip.channels) {
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
            if constexpr (std::is_same_v<Block, Convolution>) return {nullptr, count, block.product.outputs, block.side(x.height), block.side(x.width)};
            if constexpr (std::is_same_v<Block, Upsample>) return {nullptr, count, block.convolution.product.outputs, 2 * x.height, 2 * x.width};
            if constexpr (std::is_same_v<Block, Resnet>) return {nullptr, count, block.conv2.product.outputs, x.height, x.width};
            if constexpr (std::is_same_v<Block, Transformer>) return {nullptr, count, block.norm.channels, x.height, x.width};
        },
        step.block);
}

// Memory of one call, from what its thread keeps: a first pass counts, a second gives places.
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
        require(!step.joins || std::holds_alternative<Resnet>(step.block), "unet: only a resnet joins an earlier output");
        require(!step.parts || std::holds_alternative<Transformer>(step.block), "unet: halves part in a transformer");
        require(inputs_of(step) == channels, "unet: a step of ", inputs_of(step), " channels reads ", channels);
        channels = result_of(step, {nullptr, 1, channels, 1, 1}).channels;
        if (step.keeps) kept.push_back(channels);
        parting += step.parts;
    }
    require(parting == 1, "unet: halves part in ", parting, " steps, expected 1");
    require(norm.channels == channels && exit.channels == channels, "unet: the last norm and convolution are of ", norm.channels, " and ", exit.channels,
            " channels, expected ", channels);
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

void UNet::run(uintptr_t latents, uintptr_t biases, const std::vector<uintptr_t>& texts, uintptr_t out, const std::vector<uintptr_t>& outputs,
               const std::vector<uintptr_t>& queries, int64_t images, int64_t height, int64_t width, int64_t tokens, int64_t threads, int64_t vector_bytes) const {
    vector_bytes = chosen_vector_bytes("unet", vector_bytes);
    const int64_t transformers = std::count_if(steps.begin(), steps.end(), [](const Step& step) { return std::holds_alternative<Transformer>(step.block); });
    require(latents && biases && out, "unet: a pointer is null; pass data_ptr() of a CPU tensor");
    require(images > 0 && height > 0 && width > 0 && tokens > 0 && threads > 0, "unet: ", images, " images of ", height, " x ", width, " cells, ", tokens,
            " tokens, ", threads, " threads; expected at least 1 of each");
    require(static_cast<int64_t>(texts.size()) == transformers, "unet: ", texts.size(), " texts for ", transformers, " transformers");
    require(outputs.empty() || outputs.size() == steps.size() + 1, "unet: ", outputs.size(), " outputs for an entry and ", steps.size(), " steps");
    require(queries.empty() || static_cast<int64_t>(queries.size()) == transformers, "unet: ", queries.size(), " queries for ", transformers, " transformers");
    static thread_local KeptFloats arena;
    std::vector<Stage> before, after;  // the halves part
    const auto plan = [&](Memory& memory) {
        before.clear();
        after.clear();
        const Image input{reinterpret_cast<float*>(latents), images, entry.channels, height, width};
        std::vector<Image> kept;
        std::vector<Stage>* stages = &before;
        const auto part = [&, vector_bytes](const Image& x, bool is_both) {
            return Part{(is_both ? kHalves : 1) * images, 0, x.height, x.width, 0, vector_bytes};
        };
        const auto with = [](Part part, int64_t count, int64_t threads) {
            part.count = count;
            part.threads = threads;
            return part;
        };
        const auto given = [&](size_t i) { return outputs.empty() || !outputs[i] ? nullptr : reinterpret_cast<float*>(outputs[i]); };
        Image x{nullptr, images, entry.product.outputs, entry.side(height), entry.side(width)};
        x.data = given(0) ? given(0) : memory.take(x.size());
        stages->push_back({x.cells(), [=, first_part = part(input, false)](int64_t first, int64_t count, int64_t threads) {
                               entry.on(with(first_part, count, threads), input.of(first), entry.product.bias, nullptr, x.of(first));
                           }});
        kept.push_back(x);
        const float* bias = reinterpret_cast<const float*>(biases);
        size_t text = 0;
        for (size_t i = 0; i < steps.size(); ++i) {
            const Step& step = steps[i];
            Image skip{};
            if (step.joins) {
                skip = kept.back();
                kept.pop_back();
            }
            Image y = result_of(step, x);
            y.data = given(i + 1) ? given(i + 1) : memory.take(y.size());
            const Part own = part(x, stages == &after);
            if (const auto* resnet = std::get_if<Resnet>(&step.block)) {
                stages->push_back({x.cells(), [=, joins = step.joins](int64_t first, int64_t count, int64_t threads) {
                                       const float* from = joins ? joined(x, skip, first, count) : x.of(first);
                                       resnet->on(with(own, count, threads), from, bias, y.of(first));
                                   }});
                bias += resnet->conv1.product.outputs;
            } else if (const auto* convolution = std::get_if<Convolution>(&step.block)) {
                stages->push_back({x.cells(), [=](int64_t first, int64_t count, int64_t threads) {
                                       convolution->on(with(own, count, threads), x.of(first), convolution->product.bias, nullptr, y.of(first));
                                   }});
            } else if (const auto* upsample = std::get_if<Upsample>(&step.block)) {
                stages->push_back({y.cells(), [=](int64_t first, int64_t count, int64_t threads) {
                                       upsample->on(with(own, count, threads), x.of(first), y.of(first));
                                   }});
            } else {
                const auto* transformer = &std::get<Transformer>(step.block);
                const int64_t inner = transformer->entry.product.outputs, heads = transformer->heads, head = inner / heads, cells = x.cells();
                Image hidden{nullptr, x.count, inner, x.height, x.width}, query = hidden, attended{nullptr, y.count, inner, x.height, x.width};
                hidden.data = memory.take(hidden.size());
                query.data = queries.empty() ? memory.take(query.size()) : reinterpret_cast<float*>(queries[text]);
                attended.data = memory.take(attended.size());
                const float *keys = reinterpret_cast<const float*>(texts[text]), *values = keys + kHalves * images * tokens * inner;
                stages->push_back({cells, [=](int64_t first, int64_t count, int64_t threads) {
                                       transformer->before(with(own, count, threads), x.of(first), hidden.of(first), query.of(first));
                                   }});
                if (step.parts) stages = &after;
                const Part last = part(x, stages == &after);
                stages->push_back({cells, [=](int64_t first, int64_t count, int64_t threads) {
                                       const std::vector<int64_t> rows{cells * inner, head, inner}, columns{tokens * inner, tokens * head, head};
                                       const int64_t start = first * tokens * inner;
                                       attention_cpu(kFp32, place(query.of(first)), rows, place(keys + start), columns, place(values + start), columns,
                                                     place(attended.of(first)), rows, count, heads, cells, tokens, head, 1 / std::sqrt(static_cast<double>(head)),
                                                     threads, vector_bytes);
                                       transformer->after(with(last, count, threads), x.of(first), hidden.of(first), attended.of(first), y.of(first));
                                   }});
                ++text;
            }
            x = y;
            if (step.keeps) kept.push_back(x);
        }
        stages->push_back({x.cells(), [=, own = part(x, true)](int64_t first, int64_t count, int64_t threads) {
                               float* normed = scratch(count * x.cells() * x.channels);
                               group_norm_cpu(kFp32, place(x.of(first)), norm.weight, norm.bias, place(normed), count, x.cells(), norm.channels, norm.groups, norm.eps,
                                              true, threads, vector_bytes);
                               float* target = reinterpret_cast<float*>(out) + first * x.cells() * exit.product.outputs;
                               exit.on(with(own, count, threads), normed, exit.product.bias, nullptr, target);
                           }});
    };
    Memory counted(nullptr);
    plan(counted);
    Memory memory(arena.of(counted.used()));
    plan(memory);
    call(before, images, images, threads);
    call(after, kHalves * images, images, threads);
}

}  // namespace datasetdm
