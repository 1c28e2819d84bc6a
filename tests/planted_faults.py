"""Faults put into the product's own lines for one rehearsal each: `python tests/planted_faults.py NAME ...` prints the
findings of each as JSON.
"""

from __future__ import annotations

import inspect
import json
import linecache
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

from bench.rehearsal import kernels


class Fault(NamedTuple):
    """One line of a function, and what it is replaced by."""

    place: str  # module:QUALNAME
    line: str
    wrong: str
    options: dict[str, Any] = {}


FAST, GPU, DRIVER = (
    f"datasetdm_fast.{name}"
    for name in ("engine.engines.fast.engine", "engine.engines.fast.on_gpu", "engine.loop.driver")
)
RECORDED = "datasetdm_fast.engine.engines.cuda_graph:RecordedCalls.replay"
FAULTS = {
    "images decoded by other threads": Fault(
        f"{GPU}:GpuEngine._images",
        "list(map(self._decode_part, latents.split(size)))",
        "[*__import__('concurrent.futures').futures.ThreadPoolExecutor(2).map(self._decode_part, latents.split(size))]",
    ),
    "sums given back too early": Fault(
        f"{DRIVER}:BatchGenerator.label",
        "release(values)",
        "pass",
    ),
    "the label stream does not wait": Fault(f"{DRIVER}:LabelStream._follow", "self._stream.wait_event(queued)", "pass"),
    "a number is read in the loop": Fault(
        f"{DRIVER}:BatchGenerator.sample", "state.step(call, output)", "state.step(call, output).sum().item()"
    ),
    "fp32 in the fp16 network": Fault(
        "datasetdm_fast.engine.models.fused:MeasuredTransformer.forward",
        "h = self.entry(tokens(self.norm(x)))",
        "h = self.entry(tokens(self.norm(x)).float())",
    ),
    "a tensor of the host": Fault(
        "datasetdm_fast.engine.models.fused:MeasuredResnet.forward",
        "(h, x.image, self.bias)",
        "(h, x.image.cpu(), self.bias)",
    ),
    "the host reads before the copy is over": Fault(
        "datasetdm_fast.kernels.transfer:_copy",
        "torch.cuda.current_stream(values[0].device).synchronize()",
        "pass",
    ),
    "a pageable copy at the start of a batch": Fault(
        "datasetdm_fast.kernels.transfer:to_device", "value.pin_memory()", "value"
    ),
    "a graph recorded with another GPU's stream": Fault(
        "datasetdm_fast.engine.engines.cuda_graph:GraphPool.__init__",
        "new_stream(device)",
        "new_stream(0)",
        {"device": "cuda:1"},
    ),
    "a kernel launched on another GPU": Fault(
        "datasetdm_fast.kernels.layer_norm:fused",
        "torch.cuda.device_of(x)",
        "torch.cuda.device(0)",
        {"device": "cuda:1"},
    ),
    "the answer of a graph is not copied": Fault(
        "datasetdm_fast.engine.engines.cuda_graph:StepGraph.__call__",
        "tuple(value.clone() for value in self.outputs)",
        "self.outputs",
    ),
    "graphs of one pool on several streams": Fault(
        "datasetdm_fast.engine.engines.cuda_graph:StepGraph.__init__",
        "pool.stream",
        "torch.cuda.Stream(inputs[0].device)",
    ),
    "a graph recorded at every call": Fault(RECORDED, "key = (name,", "key = (len(self.graphs),"),
    "a recording that other threads can spoil": Fault(
        "datasetdm_fast.engine.engines.cuda_graph:StepGraph.__init__", ', capture_error_mode="thread_local"', ""
    ),
    "labels on the sampler's stream": Fault(
        f"{DRIVER}:LabelStream._follow", "torch.cuda.stream(self._stream)", "torch.cuda.device(self._device)"
    ),
    "numbers of a schedule copied at every batch": Fault(
        "datasetdm_fast.engine.sampling.schedule:SamplerState.__init__", "_walk_numbers(", "_walk_numbers.__wrapped__("
    ),
    "a tensor printed in the loop": Fault(
        f"{DRIVER}:BatchGenerator.sample", "state.step(call, output)", "state.step(call, output), f'{output}'"
    ),
    "fp64 in the network": Fault(
        "datasetdm_fast.engine.models.fused:MeasuredTransformer.forward",
        "h = self.entry(tokens(self.norm(x)))",
        "h = self.entry(tokens(self.norm(x)).double().to(x.image.dtype))",
    ),
    "fp32 that is TF32": Fault(
        "datasetdm_fast.engine.engines.device:allow_tf32", "= is_allowed, False", "= True, False", {"dtype": "fp32"}
    ),
    "sums of attention on the host": Fault(
        f"{DRIVER}:BatchGenerator.zero_attention_sums",
        "torch.zeros(shape, device=self.engine.device)",
        "torch.zeros(shape)",
        {"scenario": "attention"},
    ),
    "a graph for other shapes": Fault(
        RECORDED,
        "*(tuple(value.shape) for value in inputs)",
        "len(inputs[0])",
        {"scenario": "attention"},
    ),
    "a ring of earlier outputs that nothing fills": Fault(
        "datasetdm_fast.engine.sampling.schedule:SamplerState.__init__", "latents.new_zeros(", "latents.new_empty("
    ),
    "level sums that nothing clears": Fault(
        "datasetdm_fast.engine.models.capture:ProjectedSums.__init__",
        "torch.zeros(self.batch",
        "torch.empty(self.batch",
    ),
    "sums of attention that nothing clears": Fault(
        f"{DRIVER}:BatchGenerator.zero_attention_sums",
        "torch.zeros(shape",
        "torch.empty(shape",
        {"scenario": "attention"},
    ),
    "a kernel that gives way to its reference": Fault(
        "datasetdm_fast.kernels.linear_norm:fused", "if not is_served(", "if width % 3 or not is_served("
    ),
    "sums of attention in fp16": Fault(
        "datasetdm_fast.engine.models.capture:SummedAttention.attend_self",
        "*conditional, self.cells,",
        "*conditional, self.cells.half(),",
        {"scenario": "attention"},
    ),
    "columns as a list": Fault(
        "datasetdm_fast.engine.tasks.attention:spread_maps",
        "torch.stack([tokens[:, place] for place in places], 1)",
        "tokens[:, list(places)]",
        {"scenario": "attention"},
    ),
    "words left on the host": Fault(
        "datasetdm_fast.engine.tasks.captions:held_to",
        "to_device(torch.tensor(is_ruled_out, dtype=torch.bool), device)",
        "torch.tensor(is_ruled_out, dtype=torch.bool)",
        {"scenario": "words"},
    ),
    "a wait of another kind where some are allowed": Fault(
        "datasetdm_fast.engine.tasks.instance:InstanceTask.postprocess",
        "queries, classes, scores = candidates(",
        "probability.max().item(); queries, classes, scores = candidates(",
    ),
    "pictures copied while the host waits": Fault(
        "datasetdm_fast.engine.loop.inverting:InvertingGenerator.invert",
        "to_device(pixels, engine.device)",
        "pixels.to(engine.device)",
        {"scenario": "label"},
    ),
    "pictures encoded on a stream of its own": Fault(
        "datasetdm_fast.engine.loop.inverting:InvertingGenerator.invert",
        "clean = engine.encode_image(pixels)",
        "import torch; torch.cuda.stream(torch.cuda.Stream(engine.device)).__enter__(); "
        "clean = engine.encode_image(pixels)",
        {"scenario": "label"},
    ),
    "a generator of the host for noise on a GPU": Fault(
        "datasetdm_fast.engine.sampling.schedule:ImageNoise.draw",
        "generator=generator",
        'device="cuda", generator=generator',
        {"scenario": "label"},
    ),
    "an event of another GPU": Fault(
        f"{DRIVER}:LabelStream.put",
        "torch.cuda.current_stream(self._device)",
        "torch.cuda.current_stream()",
        {"scenario": "label", "device": "cuda:1"},
    ),
    "a kernel of attention on another GPU": Fault(
        "datasetdm_fast.kernels.attention_shares:fused",
        "torch.cuda.device_of(q)",
        "torch.cuda.device(0)",
        {"scenario": "label", "device": "cuda:1"},
    ),
    "a tile is read before its copy is over": Fault(
        "datasetdm_fast.engine.tasks.attention:joined_label",
        "tile_maps[None, k : k + 1].cpu()",
        'tile_maps[None, k : k + 1].to("cpu", non_blocking=True)',
        {"scenario": "tiles"},
    ),
    "pictures of a labeller on the host": Fault(
        "datasetdm_fast.engine.loop.inverting:InvertingGenerator.invert",
        "to_device(pixels, engine.device)",
        "pixels",
        {"scenario": "labeller"},
    ),
    "another stream than that of the copies is waited for": Fault(
        "datasetdm_fast.kernels.transfer:_copy",
        "torch.cuda.current_stream(values[0].device)",
        "torch.cuda.default_stream(values[0].device)",
        {"scenario": "files"},
    ),
    "a region copied while the host waits": Fault(
        "datasetdm_fast.runs.compositions.edit:Edits.begin",
        "to_device(torch.from_numpy(cells)[:, None], source.clean.device)",
        "torch.from_numpy(cells)[:, None].to(source.clean.device)",
        {"scenario": "files"},
    ),
    "latents of a callback by way of the host": Fault(
        "datasetdm_fast.engine.loop.diffusing:_after",
        "changed.to(latents)",
        "changed.cpu().to(latents)",
        {"scenario": "library"},
    ),
    "page-locked memory written while it is copied": Fault(
        "datasetdm_fast.kernels.transfer:to_device",
        "value.pin_memory().to(device, non_blocking=True)",
        "(held := value.pin_memory()).to(device, non_blocking=True) + 0 * held.zero_().numel()",
        {"scenario": "library"},
    ),
    "one of two texts on the host": Fault(
        "datasetdm_fast.engine.loop.calls:call_text",
        "text = join_texts([negative, engine.encode_text(list(prompts))])",
        "text = join_texts([negative, engine.encode_text(list(prompts)).to('cpu')])",
        {"scenario": "features"},
    ),
    "earlier outputs of a sampler in fp16": Fault(
        "datasetdm_fast.engine.sampling.schedule:SamplerState.__init__",
        "latents.new_zeros((schedule.memory, *latents.shape))",
        "latents.new_zeros((schedule.memory, *latents.shape), dtype=torch.float16)",
        {"scenario": "samplers"},
    ),
    "numbers drawn by a GPU": Fault(
        f"{FAST}:FastEngine._call",
        "latents.to(self.device)",
        "(latents + 0 * torch.randn_like(latents)).to(self.device)",
        {"scenario": "samplers"},
    ),
    "fp32 between the products of the fp16 network": Fault(
        "datasetdm_fast.engine.models.fused:MeasuredResnet.forward",
        "(h, x.image, self.bias)",
        "(h, (x.image.float() * 1.0).to(x.image.dtype), self.bias)",
        {"scenario": "library"},
    ),
    "an input of a graph is written to": Fault(
        f"{FAST}:FastEngine._biases",
        "return self._rows[timestep]",
        "return self._rows[timestep].add_(0)",
        {"scenario": "library"},
    ),
    "an input of a graph is not copied": Fault(
        "datasetdm_fast.engine.engines.cuda_graph:StepGraph.__call__",
        "if is_fresh or self.held[place] is not value:",
        "if is_fresh:",
        {"scenario": "attention"},
    ),
    "outputs of a graph are read before its replay": Fault(
        "datasetdm_fast.engine.engines.cuda_graph:StepGraph.__call__",
        "self.graph.replay()",
        "answers = tuple(value.clone() for value in self.outputs); self.graph.replay(); return answers",
    ),
    "a graph over its caller's tensors": Fault(
        "datasetdm_fast.engine.engines.cuda_graph:StepGraph.__init__",
        "[torch.empty_like(value).copy_(value) for value in inputs]",
        "list(inputs)",
    ),
    "a graph that is not replayed": Fault(
        "datasetdm_fast.engine.engines.cuda_graph:StepGraph.__call__", "self.graph.replay()", "pass"
    ),
    "algorithms chosen by timing": Fault(
        "datasetdm_fast.engine.engines.device:choose_by_shape", "= False, True", "= True, False"
    ),
    "two threads record at once": Fault(
        "datasetdm_fast.engine.engines.cuda_graph:StepGraph.__init__",
        "with TURN, torch.cuda.device(",
        "with torch.cuda.device(",
        {"scenario": "between"},
    ),
    "graphs of a pool on two streams at once": Fault(
        "datasetdm_fast.engine.engines.cuda_graph:InOrder.follow",
        "current.wait_stream(self.last)",
        "pass",
        {"scenario": "between"},
    ),
    "an autoencoder of fp32 is given fp16": Fault(
        f"{FAST}:FastEngine._decode_part",
        "channels_last(latents, torch.float32)",
        "channels_last(latents, self.dtype)",
        {"scenario": "retry"},
    ),
    "a wait for the whole GPU where memory ran out": Fault(
        f"{GPU}:GpuEngine._parts",
        "self.widest, self.adjustments = worked",
        "torch.cuda.synchronize(); self.widest, self.adjustments = worked",
        {"scenario": "memory"},
    ),
    "memory given back at every batch": Fault(
        f"{GPU}:GpuEngine._images",
        "size = min(",
        "torch.cuda.empty_cache(); size = min(",
        {"scenario": "cards"},
    ),
    "the reference's tokens on the host": Fault(
        "datasetdm_fast.engine.backbones.sd_reference:SDReference.encode",
        "self.model.text_length, encoder.device)",
        "self.model.text_length, torch.device('cpu'))",
        {"scenario": "verify"},
    ),
    "captures copied while a thread waits": Fault(
        "datasetdm_fast.training.captures.cache:StoredCaptures.batch",
        "pin_memory=is_queued",
        "pin_memory=False",
        {"scenario": "training"},
    ),
    "a loss read for every part of a batch": Fault(
        "datasetdm_fast.training.trainer:Trainer._step",
        "total += loss.detach()",
        "total += loss.item()",
        {"scenario": "training"},
    ),
    "a resumed optimiser on the host": Fault(
        "datasetdm_fast.training.state:TrainingState.resume",
        "value.to(parameter, copy=True)",
        "value.clone()",
        {"scenario": "training"},
    ),
    "truth of each image copied while the host waits": Fault(
        "datasetdm_fast.training.trainer:query_target",
        "to_device(masks, device)",
        "masks.to(device)",
        {"scenario": "losses", "batches": 1},
    ),
    "points drawn by a GPU": Fault(
        "datasetdm_fast.training.losses:sample_places",
        "torch.rand(sum(sizes), 2, generator=generator)",
        "torch.rand(sum(sizes), 2, generator=generator, device=like.device)",
        {"scenario": "losses", "batches": 1},
    ),
    "a training in fp32 that rounds to TF32": Fault(
        "datasetdm_fast.training.trainer:Trainer._step",
        "allow_tf32(self.device, self.dtype is not torch.float32)",
        "allow_tf32(self.device, True)",
        {"scenario": "recomputed", "dtype": "fp32"},
    ),
    "noise of pictures copied while the host waits": Fault(
        "datasetdm_fast.engine.sampling.schedule:ImageNoise.draw",
        "to_device(noise, self.device)",
        "noise.to(self.device)",
        {"scenario": "recomputed"},
    ),
    "words of a prompt copied while the host waits": Fault(
        "datasetdm_fast.training.evaluation.measure:measure",
        "text = words[label][None].expand",
        "text = words[label].cpu()[None].expand",
        {"scenario": "evaluation"},
    ),
    "texts of a graph that are freed": Fault(
        RECORDED,
        "StepGraph(run, inputs, pool, fresh)",
        "StepGraph(lambda *given: run(*given[:2], *inputs[2:]), inputs, pool, fresh)",
    ),
    "sums of a level added in any order": Fault(
        "datasetdm_fast.engine.models.capture:ProjectedSums.attend",
        "self.sums[level].add_(projected.flatten(0, 1), alpha=1 / blocks)",
        "self.sums[level].index_add_(0, torch.arange(len(self.sums[level]), device=q.device), projected.flatten(0, 1))",
    ),
    "a kernel that adds in any order": Fault(
        "datasetdm_fast.kernels.attention_shares:_attention_shares_kernel",
        "tl.store(out_ptr + place, total",
        "tl.atomic_add(out_ptr + place, total",
        {"scenario": "attention"},
    ),
    "operations that have no kernel for a GPU": Fault(
        "datasetdm_fast.kernels.choice:form_on", "for name in names if", "for name in names[:2] if"
    ),
    "statistics of a norm in fp16": Fault(
        "datasetdm_fast.kernels.add_statistics:empty_statistics", "dtype=torch.float32", "dtype=x.dtype"
    ),
    "sums of taps in fp16": Fault(
        "datasetdm_fast.kernels.depth_head:fused", "cells), dtype=torch.float32", "cells), dtype=x.dtype"
    ),
    "rows of another type than their weights": Fault(
        "datasetdm_fast.kernels.layer_norm:fused", "x = x.contiguous()", "x = x.contiguous().float()"
    ),
    "a weight with gaps": Fault(
        "datasetdm_fast.kernels.linear_norm:fused",
        "weight.contiguous(), residual",
        "weight.t().contiguous().t(), residual",
    ),
    "a norm's gain that is one number": Fault(
        "datasetdm_fast.kernels.layer_norm:fused",
        "x = x.contiguous()",
        "x, weight = x.contiguous(), weight[:1].expand(channels)",
    ),
    "a number printed in the loop": Fault(
        f"{DRIVER}:BatchGenerator.sample", "state.step(call, output)", "repr(state.step(call, output).sum())"
    ),
    "a loop that asks an event": Fault(
        f"{DRIVER}:LabelStream.put",
        "queued.record(torch.cuda.current_stream(self._device))",
        "queued.record(torch.cuda.current_stream(self._device)); list(iter(queued.query, True))",
    ),
    "page-locked memory filled through an array while it is copied": Fault(
        "datasetdm_fast.kernels.transfer:to_device",
        "value.pin_memory().to(device, non_blocking=True)",
        "(held := value.pin_memory()).to(device, non_blocking=True) + 0 * (held.numpy().fill(0) or 0)",
        {"scenario": "library"},
    ),
    "page-locked memory filled past NumPy while it is copied": Fault(
        "datasetdm_fast.kernels.transfer:to_device",
        "value.pin_memory().to(device, non_blocking=True)",
        "(held := value.pin_memory()).to(device, non_blocking=True) + 0 * "
        "__import__('io').BytesIO(b'7').readinto(held.numpy())",
        {"scenario": "library"},
    ),
    "rows that are filled again while they are copied": Fault(
        "datasetdm_fast.training.captures.cache:StoredCaptures.batch",
        "rows = torch.empty(calls, len(views), self.layout.values, dtype=torch.float16, pin_memory=is_queued)",
        "rows = vars(self).setdefault(str(len(views)), "
        "torch.empty(calls, len(views), self.layout.values, dtype=torch.float16, pin_memory=is_queued))",
        {"scenario": "training"},
    ),
    "a call that is over by an event of another GPU": Fault(
        f"{DRIVER}:FinishedCalls.on_queued",
        "torch.cuda.current_stream(self._device)",
        "torch.cuda.current_stream()",
        {"device": "cuda:1"},
    ),
    "an event that is never recorded": Fault(
        f"{DRIVER}:FinishedCalls.on_queued", "over.record(torch.cuda.current_stream(self._device))", "pass"
    ),
    "latents by way of another GPU": Fault(
        f"{FAST}:FastEngine._call",
        "latents.to(self.device)",
        'latents.to("cuda:0").to(self.device)',
        {"device": "cuda:1"},
    ),
    "free memory of another GPU": Fault(
        "datasetdm_fast.engine.engines.device:suggest_batch",
        "torch.cuda.mem_get_info(device)",
        "torch.cuda.mem_get_info()",
        {"scenario": "library", "device": "cuda:1"},
    ),
    "networks in fp32 where nobody asked for it": Fault(
        f"{FAST}:resolve_precision", 'return "fp16" if', 'return "fp32" if'
    ),
    "decoders in fp32": Fault(
        f"{GPU}:GpuEngine._ready", "torch.float32 if is_wide else torch.float16", "torch.float32"
    ),
    "an encoder of pictures in fp32": Fault(
        f"{FAST}:FastEngine._encode_part",
        "moments_of(self.image_encoder, images, self.image_dtype)",
        "moments_of(self.image_encoder.float(), images, torch.float32)",
        {"scenario": "label"},
    ),
    "projections of a capture in fp32": Fault(
        "datasetdm_fast.engine.models.capture:ProjectedSums.feature",
        "cells = half.flatten(0, 1)",
        "cells, weight = half.flatten(0, 1).float(), weight.float()",
    ),
    "latents of pictures in fp16": Fault(
        f"{FAST}:sample_moments", "moments.chunk(2, 1)", "moments.half().chunk(2, 1)", {"scenario": "label"}
    ),
    "an inverse in the loop": Fault(
        f"{DRIVER}:BatchGenerator.sample",
        "state.step(call, output)",
        "state.step(call, output) + 0 * type(output).inverse(output[0, 0]).sum()",
    ),
    "a training whose products are in fp32": Fault(
        "datasetdm_fast.training.trainer:Trainer._step",
        "enabled=self.dtype is not torch.float32",
        "enabled=False",
        {"scenario": "training"},
    ),
    "a graph that reads another tensor than its input": Fault(
        RECORDED,
        "StepGraph(run, inputs, pool, fresh)",
        "StepGraph(lambda given, _, *others: run(given, inputs[1], *others), inputs, pool, fresh)",
    ),
    "candidates of which equal ones come in any order": Fault(
        "datasetdm_fast.engine.tasks.instance:candidates",
        "(values[:, :count] for values in probability.flatten(1).sort(dim=1, descending=True, stable=True))",
        "probability.flatten(1).topk(count)",
    ),
    "several values for one place": Fault(
        "datasetdm_fast.engine.tasks.open_vocabulary:OpenVocabularyTask.postprocess",
        "is_word = largest > 0",
        "is_word = likely.scatter(1, winner[:, None], largest[:, None]).amax(1) > 0",
        {"scenario": "words"},
    ),
    "costs copied image by image": Fault(
        "datasetdm_fast.training.losses:match",
        "cost.float().nan_to_num().cpu().numpy()",
        "np.stack([one.cpu().numpy() for one in cost.float().nan_to_num()])",
        {"scenario": "losses", "batches": 1},
    ),
    "a loss read before the step is queued": Fault(
        "datasetdm_fast.training.trainer:Trainer._step",
        "state.scaler.step(state.optimiser)",
        "self._finite(total), state.scaler.step(state.optimiser)",
        {"scenario": "training"},
    ),
    "a kernel launched with no blocks": Fault(
        "datasetdm_fast.kernels.layer_norm:fused", "ceil_divide(rows, sizes", "0 * ceil_divide(rows, sizes"
    ),
    "more blocks than a GPU takes": Fault(
        "datasetdm_fast.kernels.upsample_concat:fused", "columns, len(first)]", "columns, 2**16 * len(first)]"
    ),
    "views of a student copied while the host waits": Fault(
        "bench.proof.students.course:NetworkTraining.step",
        "to_device(as_tensor(items, network.colours), self.device)",
        "as_tensor(items, network.colours).to(self.device)",
        {"scenario": "students", "batches": 1},
    ),
}


@contextmanager
def planted(fault: Fault) -> Iterator[int]:
    """The function with its wrong line, as if it stood so in its file; the number of that line."""
    module, _, name = fault.place.partition(":")
    found: Any = __import__(module, fromlist=["_"])
    for part in name.split("."):
        found = getattr(found, part)
    function = inspect.unwrap(found)
    function = getattr(function, "fn", function)  # of a kernel
    path = Path(inspect.getsourcefile(function))
    lines, first = inspect.getsourcelines(function)
    places = [first + place for place, line in enumerate(lines) if fault.line in line]
    assert len(places) == 1, f"{fault.place} has {len(places)} lines with {fault.line}"
    source = path.read_text(encoding="utf-8").splitlines(keepends=True)
    source[places[0] - 1] = source[places[0] - 1].replace(fault.line, fault.wrong)
    right = function.__code__
    codes = [code for code in nested(compile("".join(source), str(path), "exec")) if code.co_qualname == name]
    function.__code__ = codes[0]
    linecache.cache[str(path)] = len(source), None, source, str(path)  # for what reads a kernel's source
    forget_sources()
    try:
        yield places[0]
    finally:
        function.__code__ = right
        del linecache.cache[str(path)]
        forget_sources()


def forget_sources() -> None:
    """What a rehearsal has read of the kernels' sources is read anew."""
    for cached in (kernels.source_of, kernels.accesses, kernels.stated):
        cached.cache_clear()


def nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


def main(names: list[str]) -> None:
    from bench.rehearsal.run import rehearse

    warnings.simplefilter("ignore")
    for name in names:
        fault = FAULTS[name]
        with planted(fault) as line:
            found = rehearse("tiny", 4, **{"batches": 2, "steps": 2, **fault.options})
        findings = [asdict(one) for one in found.findings]
        print(json.dumps({"name": name, "line": line, "findings": findings}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(FAULTS))
