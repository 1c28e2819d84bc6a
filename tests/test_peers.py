"""Peers of the bench: the outputs of each match the reference's, and none is timed whose do not."""

import os
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from skips import long_test

from bench import suite
from bench.machine import limits, measure
from bench.machine.work import TERA, image_flops, stage_flops
from bench.peers import PEERS, Offer, compiled, diffusers, upstream
from bench.peers.engine import EnginePeer
from bench.report import tables
from bench.report.results import ResultFile
from bench.rows import ladder, layers, ops, parity, peers, profile, quality, race, stages
from bench.rows import limits as limit_rows
from bench.rows.measurement import BenchRun
from bench.setting import open_setting
from datasetdm_fast import _C, kernels
from datasetdm_fast.data import Text
from datasetdm_fast.engine.engines.fast import FastEngine
from datasetdm_fast.errors import GateFailed, Missing

pytestmark = pytest.mark.usefixtures("tiny_has_one_layer")

LIMITS = {"tflops": {"fp32": 0.1, "bf16": 0.2}, "gbps": 20.0, "gexps": 1.0}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting():
    return open_setting("tiny", "cpu", steps=2, number=4, quick=True)


@pytest.fixture(scope="module")
def judge(setting):
    return parity.ParityJudge(setting, 2)


@pytest.fixture
def run(setting, judge):
    """A run of the bench whose limits were measured and whose best batch is 2."""
    rows = {"limits": [LIMITS], "peers": [{"peer": "ours", "batch": 2}]}
    parts = {name: {"status": "done", "rows": found} for name, found in rows.items()}
    found = BenchRun(setting, ResultFile(None, {"parts": parts}), 0.1, 2)
    found.judge = judge
    return found


@pytest.mark.parametrize("name", ["upstream", "torch", "diffusers", "ours", "ours-bf16"])
def test_every_peer_agrees_with_the_oracle(name, setting, judge):
    peer = PEERS[name].build(setting, PEERS[name].batch or 2)
    rows = judge.rows(peer, peer.make(setting.batch(peer.batch)))
    assert not parity.failures(rows)
    assert {"text", "call", "level low", "level highest", "free image"} <= {row.measure for row in rows}
    if PEERS[name].draws:
        assert peer.draw(setting.batch(peer.batch)).shape == (peer.batch, 128, 128, 3)


def test_every_technique_of_the_ladder_agrees(setting, judge):
    for name in ("maps once", "decoders", "batches"):
        peer = ladder.TECHNIQUES[name].build(setting, 1)
        assert not parity.failures(judge.rows(peer, peer.make(setting.batch(1))))


def test_a_technique_of_the_ladder_changes_one_thing_on_a_gpu_too():
    """There ours has 16 bits by itself: they are a row of their own, after all that is in fp32."""
    *in_fp32, last = ladder.ON_GPU
    assert (last, ladder.ON_GPU[last].title) == ("ours", ladder.HALF)
    assert [ladder.ON_GPU[name].title for name in in_fp32] == [one.title for one in ladder.TECHNIQUES.values()][:-1]


def test_ours_before_its_last_technique_is_in_fp32(setting, monkeypatch):
    monkeypatch.setattr("datasetdm_fast.engine.engines.fast.engine.resolve_precision", lambda name, device: name)
    for name in ("lean", "ours-fp32"):
        assert ladder.ON_GPU[name].build(setting, 1).dtype == "fp32"


def test_diffusers_is_measured_with_its_settings_for_a_gpu(setting, judge):
    peer = PEERS["diffusers-tuned"].build(setting, 2)
    assert not parity.failures(judge.rows(peer, peer.make(setting.batch(2))))
    assert peer.unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    with peer._arithmetic():
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark


@long_test
def test_calls_that_are_judged_are_those_that_diffusers_compiled(setting, judge, monkeypatch):
    """Compiling a UNet takes minutes on a GPU: the same code serves the pipeline and a call by itself."""
    graphs, compile = [], torch.compile

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda one, **_: compile(one, fullgraph=True, dynamic=False, backend=counted))
    peer = compiled.build(setting, 2)
    assert not parity.failures(judge.rows(peer, peer.make(setting.batch(2))))
    assert len(graphs) == 2  # of the UNet and the autoencoder
    torch._dynamo.reset()


def test_decoders_of_diffusers_on_a_gpu_are_those_of_our_engine_there(setting, judge):
    """In fp16: in fp32 without TF32 they would take several times as long as ours, within the time of its images."""
    _, capture = setting.reference.denoise_and_capture(*judge.inputs(setting.recipe.captured[-1], 1))
    narrow = diffusers.narrow_decoders(setting)
    assert {next(decoder.parameters()).dtype for decoder in narrow.values()} == {torch.float16}
    with torch.inference_mode():
        found = diffusers.answered(narrow["depth"], capture)
        truth = setting.reference.annotate("depth", capture)
    assert found["depth"].dtype == torch.float32 and measure.distance(found["depth"], truth["depth"]) < 1e-2


def test_images_alone_are_timed_where_the_peer_has_them(monkeypatch, run):
    asked = []
    monkeypatch.setattr(
        peers, "race", lambda run, names, without_labels, **_: asked.append((names, without_labels)) or []
    )
    for part in peers.one_by_one(("upstream", "diffusers")):
        part.rows(run)
    assert asked == [(("upstream", "ours"), False), (("diffusers", "ours"), True)]


def test_ours_is_not_timed_beside_a_peer_that_is_not_there(run):
    (part,) = peers.one_by_one(("tensorrt",))
    assert [(row["peer"], row["status"]) for row in part.rows(run)] == [("tensorrt", "absent")]


@pytest.mark.parametrize("has_tf32", [True, False])
def test_upstream_has_cudnn_as_everybody_has(monkeypatch, has_tf32):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    with upstream.arithmetic(has_tf32):
        assert torch.backends.cudnn.enabled and torch.backends.cudnn.allow_tf32 == has_tf32


def test_labels_of_upstream_are_those_of_the_oracle(setting):
    """Of seeded weights the gates judge no labels, but these must be equal up to rounding."""
    ours, theirs = (
        PEERS[name].build(setting, 1).make(setting.batch(1))[0].annotations for name in ("torch", "upstream")
    )
    assert (ours["semantic"].labels == theirs["semantic"].labels).mean() > 0.999
    assert abs(ours["depth"].metres - theirs["depth"].metres).max() < 1e-3


def test_upstream_forms_its_maps_at_every_call(setting, monkeypatch):
    seen = []
    monkeypatch.setattr(
        upstream.AttentionMaps,
        "see",
        lambda store, probabilities, place, is_text: seen.append((place, is_text, probabilities.shape[-1])),
    )
    peer = upstream.Upstream(setting)
    peer.denoise(torch.zeros(1, 4, 16, 16), 500, Text(torch.zeros(2, 77, 32)))
    assert len(seen) == 20 and sum(is_text for _, is_text, _ in seen) == 10 and max(width for *_, width in seen) == 256


def test_upstream_averages_anew_for_every_level_of_every_decoder(setting, monkeypatch):
    times, average = [], upstream.AttentionMaps.average
    monkeypatch.setattr(upstream.AttentionMaps, "average", lambda store: times.append(1) or average(store))
    upstream.Upstream(setting).make(setting.batch(1))
    assert len(times) == 4 * len(setting.recipe.tasks)


def broken_geglu(x):
    return 1.02 * kernels.plain.geglu(x)


def broken(setting, batch):
    engine = FastEngine(
        setting.model,
        setting.reference.decoders,
        device="cpu",
        ops=SimpleNamespace(**{**vars(kernels.plain), "geglu": broken_geglu}),
    )
    return EnginePeer(engine, setting, batch)


@long_test
def test_a_broken_kernel_is_a_failed_row_that_nobody_timed(run):
    offers = {
        "ours": Offer("broken on purpose", broken, batch=1, must_run=True),
        "torch": PEERS["torch"]._replace(batch=1),
    }
    rows = {row["peer"]: row for row in race.race(run, ("ours", "torch"), offers)}
    assert (
        rows["ours"]["status"] == "failed" and "call" in rows["ours"]["why"] and "seconds_per_image" not in rows["ours"]
    )
    assert rows["torch"]["status"] == "ok" and rows["torch"]["images_per_second"] > 0
    with pytest.raises(GateFailed, match="broken|ours") as stopped:
        suite.check({"parts": {"peers": {"status": "done", "rows": list(rows.values())}}})
    assert stopped.value.exit_code == 4


def test_a_peer_that_raises_is_failed_where_it_is_ours_and_absent_elsewhere(run):
    def raises(setting, batch):
        raise ValueError("no such kernel")

    offers = {"ours": Offer("ours", raises, must_run=True), "theirs": Offer("theirs", raises)}
    rows = race.race(run, ("ours", "theirs"), offers)
    assert [(row["status"], row["why"]) for row in rows] == [
        ("failed", "ValueError: no such kernel"),
        ("absent", "ValueError: no such kernel"),
    ]


def test_a_peer_that_raises_after_it_agreed_is_failed_where_it_must_run_and_absent_elsewhere(run, monkeypatch):
    monkeypatch.setattr(race, "first_batch", lambda *_: ([], 0.0, 0))
    agreeing = SimpleNamespace(setting=run.setting, batches={}, judge=SimpleNamespace(rows=lambda *_: []))
    for must_run, status in ((True, "failed"), (False, "absent")):
        peer = SimpleNamespace(batch=1, dtype="fp32")
        offer = Offer("one", lambda *_, peer=peer: peer, batch=1, must_run=must_run)
        row, runner = race.prepare(agreeing, "one", offer)
        runner.noting(lambda: 1 // 0)()
        assert row["status"] == status and row["why"].startswith("ZeroDivisionError")


def test_a_peer_that_raises_while_it_is_timed_is_failed_and_the_others_are_timed(run, monkeypatch):
    """After its first batch agreed: in the round that does not count, in one that does, and where it draws alone."""
    made = dict.fromkeys(("ours", "ours-1", "ours-bf16", "torch"), 0)

    def batch_of(name: str) -> None:
        made[name] += 1
        if made[name] == {"ours-1": 1, "ours-bf16": 3}.get(name):
            raise RuntimeError(f"{name} is out of luck\nand more")

    def draw(name: str) -> None:
        if name == "torch":
            raise Missing("no memory of a kind", "get some")

    def prepare(run, name, offer):
        peer = SimpleNamespace(batch=2, call=lambda: batch_of(name), draw=lambda requests: draw(name))
        row = {"peer": name, "status": "ok", "dtype": "fp32"}
        return row, race.Runner(name, peer, row)

    monkeypatch.setattr(race, "prepare", prepare)
    monkeypatch.setattr(race, "to_files", lambda peer, *_: peer.call)
    offers = {name: PEERS["ours"] for name in made}
    ours, first, counted, drawing = race.race(run, tuple(made), offers, without_labels=True)
    for row in (first, counted):
        assert row["why"] == f"RuntimeError: {row['peer']} is out of luck" and row["status"] == "failed"
        assert "seconds_per_image" not in row and made[row["peer"]] < 4
    assert (drawing["status"], drawing["why"]) == ("absent", "no memory of a kind")
    assert ours["status"] == "ok" and len(ours["seconds_per_image"]["rounds"]) >= race.LEAST_ROUNDS
    assert ours["images_alone_s"]["median"] > 0 and "images_alone_s" not in drawing


@long_test
def test_a_race_gives_rates_and_ratios_that_can_be_computed_again(run, setting):
    offers = {name: PEERS[name]._replace(batch=2) for name in ("torch", "ours")}
    rows = {row["peer"]: row for row in race.race(run, ("torch", "ours"), offers, without_labels=True)}
    ours, theirs = rows["ours"]["seconds_per_image"], rows["torch"]["seconds_per_image"]
    assert len(ours["rounds"]) >= race.LEAST_ROUNDS and set(rows["ours"]["attention"]) == {
        *("load_average", "cpu_per_wall", "others"),
    }
    assert rows["ours"]["images_per_second"] == pytest.approx(1 / ours["median"], rel=1e-3)
    assert rows["ours"]["tflops"] == pytest.approx(setting.flops / TERA / ours["median"], rel=1e-2)
    assert rows["torch"]["ours_over"]["rounds"] == pytest.approx(
        [b / a for a, b in zip(ours["rounds"], theirs["rounds"])], rel=1e-3
    )
    assert rows["ours"]["images_alone_s"]["median"] < 2 * ours["median"]


def test_stages_are_compared_and_timed_both_ways(run, setting):
    rows = {row["stage"]: row for row in stages.rows(run)}
    assert list(rows)[:3] == ["text", "call", "captured call"] and {
        f"decoder {task}" for task in setting.recipe.tasks
    } < set(rows)
    assert all(row["status"] == "ok" for row in rows.values())
    assert all(row["error"] <= row["limit"] and row["ratio"]["median"] > 0 for row in rows.values() if "error" in row)
    assert {row["naive_dtype"] for row in rows.values() if "naive_s" in row} == {"fp32"}
    assert stages.precision({"dtype": "fp16", "naive_dtype": "fp32"}) == "fp32, ours fp16"
    assert "naive_s" not in rows["encode"] and rows["encode"]["ours_s"]["median"] > 0


def test_profile_shares_add_up_to_the_call(run, monkeypatch):
    monkeypatch.setattr(profile, "PROFILED", ("ours",))
    (row,) = profile.rows(run)
    shares = row["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.01) and 0 <= shares[profile.IDLE] < 0.7
    assert all(shares[group] > 0 for group in ("attention", "convolution", "norm", "linear")), shares
    assert (
        profile.group_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
        and profile.group_of("aten::mul") == profile.REST
    )


def test_drift_is_nought_of_the_same_and_seen_of_others(setting):
    """The labels of two other seeds stand for a way that changes the result."""
    peer = PEERS["torch"].build(setting, 2)
    samples = peer.make(setting.batch(2))
    same, other = quality.drift(samples, samples), quality.drift(samples, samples[::-1])
    assert (same["mask_iou"], same["depth_absrel"], same["keypoint_px"], same["psnr_db"]) == (1.0, 0.0, 0.0, 180.0)
    assert other["depth_absrel"] > 0 and other["keypoint_px"] > 0 and other["psnr_db"] < 60


def test_an_absent_peer_says_why(run):
    (row,) = race.race(run, ("upstream-tf32",))
    assert row["status"] == "absent" and "a CPU has no such arithmetic" in row["why"]


def test_operations_are_judged_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(ops, "OPS", {name: kernels.OPS[name] for name in ("geglu", "layer_norm", "mask_head")})
    monkeypatch.setattr(kernels.native, "geglu", broken_geglu)
    timing = ops.OpTiming(CPU, "fp32", LIMITS, 0.001, has_sizes=False)
    rows = [row for op in ops.OPS for row in timing.rows(op)]
    assert {row["op"] for row in rows} == {"geglu", "layer_norm"}
    for row in rows:
        assert row["status"] == ("failed" if row["op"] == "geglu" else "ok")
        assert "form_s" not in row or row["op"] == "layer_norm"
    assert any("form_s" in row for row in rows)


@pytest.mark.parametrize("op", ("group_norm_silu", "layer_norm", "geglu", "attention"))
def test_an_operation_is_measured_in_the_form_the_engine_runs(monkeypatch, op):
    """All cases, judged and timed, come from the extension; no network there shifts norms of rows or gates by SiLU."""
    monkeypatch.setattr(ops, "OPS", {op: kernels.OPS[op]})
    name, calls = op.removesuffix("_silu"), []
    inner = getattr(_C, name)
    monkeypatch.setattr(_C, name, lambda *given: calls.append(name) or inner(*given))
    rows = []
    for row in ops.OpTiming(CPU, "fp32", LIMITS, 0.0, has_sizes=False).rows(op):
        assert (
            row["form"] == "engine"
            and row["status"] == "ok"
            and (calls or any(one in row["case"] for one in ("shift", "SiLU", "own takes")))
        ), row
        rows.append(row)
        calls.clear()
    assert any("form_s" in row for row in rows)


def test_an_operation_is_timed_at_the_sizes_of_stable_diffusion():
    """But for those that would take a CPU long, of which the largest of the small cases is timed."""
    timing = ops.OpTiming(CPU, "fp32", LIMITS, 0.0)
    rows = [row for op in ("guided_step", "depth_head") for row in timing.rows(op)]
    assert all(row["status"] == "ok" for row in rows)
    timed = [row["case"] for row in rows if "form_s" in row]
    assert timed == [*(f"SD 1.x: {count} earlier entries" for count in (0, 1, 3)), "demo's cells and channels"]


def test_both_forms_of_an_operation_take_turns():
    turns = []
    timing = ops.OpTiming(CPU, "fp32", LIMITS, 0.0)
    taken = timing.seconds_of({"plain": lambda: turns.append("plain"), "form": lambda: turns.append("form")})
    assert turns == ["plain", "form"] * (1 + ops.LEAST_ROUNDS) and len(taken) == 2


def test_the_count_of_stable_diffusion_is_the_published_one():
    """401.6 GMAC a UNet forward, 1257 an image decoding, 13.3 GFLOP a prompt: 84.5 TFLOP an image at 51 calls."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from datasetdm_fast.engine.backbones.sd import DOWN_BLOCKS, UP_BLOCKS

    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=DOWN_BLOCKS,
            up_block_types=UP_BLOCKS,
            sample_size=64,
            attention_head_dim=8,
            cross_attention_dim=768,
        )
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        networks = {
            "unet": unet,
            "vae": AutoencoderKL(**vae, layers_per_block=2, latent_channels=4),
            "text_encoder": text,
        }
        model = SimpleNamespace(modules=networks, networks=networks, size=512)
    stages = stage_flops(model)
    assert stages["call"] / 2e9 == pytest.approx(401.6, rel=1e-3) and stages["image"] / 2e9 == pytest.approx(
        1257, rel=1e-3
    )
    assert stages["text"] / 1e9 == pytest.approx(13.3, rel=1e-2)
    assert image_flops(stages, 51) / TERA == pytest.approx(84.5, rel=1e-3)


def test_limits_are_rates_of_this_machine():
    found = limits.measure(CPU, 0.02)
    assert 1e-3 < found["tflops"]["fp32"] < 100 and 0.1 < found["gbps"] < 10_000 and found["gexps"] > 1e-3


def test_a_limit_is_no_lower_than_what_the_models_layers_reach(run, monkeypatch):
    monkeypatch.setattr(limits, "measure", lambda device, seconds: {"tflops": {"fp32": 1e-6, "bf16": 1e6}})
    monkeypatch.setattr(layers, "LIMIT_IMAGES", (1,))
    (found,) = limit_rows.rows(run)
    assert 1e-3 < found["tflops"]["fp32"] < 100 and found["tflops"]["bf16"] == 1e6


@pytest.mark.parametrize(
    ("rounds", "others", "why"),
    [
        ((1.0, 1.05, 1.1), 0.02, ""),
        ((1.0, 1.0, 1.2), 0.02, "spread 20 %"),
        ((1.0, 1.0, 1.0), 0.3, "others used 30 % of the cores"),
        ((1.0, 1.0, 1.85), 0.3, "spread 85 % and others used 30 % of the cores"),
        ((1.0, 1.0, 1.0, 1.1, 1.85), 0.0, ""),  # of five rounds or more the ends are left aside
        ((1.0, 1.0, 1.0, 1.2, 1.2), 0.0, "spread 20 %"),
    ],
)
def test_a_row_of_differing_rounds_or_of_a_busy_machine_is_marked(rounds, others, why):
    share = asdict(measure.CpuShare(1.0, 1.9, others))
    assert tables.unsteady({"seconds_per_image": measure.spread(rounds), "attention": share}) == why


def test_what_others_use_of_the_machine_is_told_apart_from_ours(monkeypatch):
    busy = iter([(10.0, 100.0), (13.0, 104.0)])
    monkeypatch.setattr(measure, "core_seconds", lambda: next(busy))
    with measure.watched() as attention:
        pass
    assert attention.others == pytest.approx(0.75, abs=0.01) and attention.load_average >= 0


def test_the_nearest_limit_is_the_one_that_takes_longest():
    found = limits.nearest_limit(1e9, 1e9, 0, 0.1, LIMITS, "fp32")  # 10 ms of products, 50 ms of memory
    assert (
        found["bound"] == "memory" and found["share"] == pytest.approx(0.5) and found["tflops"] == pytest.approx(0.01)
    )


@pytest.mark.skipif(
    not os.environ.get("DATASETDM_UPSTREAM"), reason="DATASETDM_UPSTREAM does not name a checkout of showlab/DatasetDM"
)
def test_classes_of_upstream_agree(monkeypatch):
    """Its UNet, attention store and loop at 512 pixels; the norms it vendors have 32 groups whatever the model says."""
    from datasetdm_fast.engine.loading import presets

    preset = presets.preset

    def with_its_groups(name, parts, *rest, **more):
        return preset(name, parts | {"unet": parts["unet"] | {"norm_num_groups": 32}}, *rest, **more)

    monkeypatch.setattr(presets, "preset", with_its_groups)
    setting = open_setting("tiny", "cpu", steps=3, number=1, size=512)
    peer = PEERS["upstream-classes"].build(setting, 1)
    rows = parity.ParityJudge(setting, 1).rows(peer, peer.make(setting.batch(1)))
    assert not parity.failures(rows)
