"""DatasetDM's modules by a changed import line: batches, a training loop, and the checkpoint that it saves."""

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from test_decoders import seeded_state

from datasetdm_fast.compat.showlab_modules import ptp_utils
from datasetdm_fast.compat.showlab_modules.attention import AttentionStore
from datasetdm_fast.compat.showlab_modules.decoders import Depthmodule, seg_decorder
from datasetdm_fast.compat.showlab_modules.unet import UNet2D, clear_feature_dic, get_feature_dic
from datasetdm_fast.engine.decoders import upstream as checkpoints
from datasetdm_fast.engine.decoders.checkpoint import build_decoder
from datasetdm_fast.engine.decoders.config import upstream
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loading.model import SD_SCHEDULER

TEXTS = ("a red ball", "a blue star on grass")
BETAS = {name: SD_SCHEDULER[name] for name in ("beta_start", "beta_end", "beta_schedule")}


@pytest.fixture(scope="module")
def parts():
    """U-Net, autoencoder, tokenizer, text encoder and scheduler, as a script of DatasetDM loads them."""
    model = load_model("demo")
    unet = UNet2D.from_pretrained("demo", subfolder="unet", engine="torch", device="cpu").to("cuda")
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    return unet, model.vae, model.clip_tokenizer, model.text_encoder, scheduler


def state_of(kind: str, parts) -> dict[str, torch.Tensor]:
    """A checkpoint of DatasetDM's names with seeded weights for the demo model."""
    network, settings = checkpoints.KINDS[kind]
    model = parts[0].model
    sizes = {"width": 16, "levels": model.levels, **settings}
    sizes |= {"layers": 2, "feed_forward": 24, "mask_dim": 12, "queries": 20, "text_width": model.text_width}
    config = upstream(network, **sizes)
    shapes = {name: value.shape for name, value in build_decoder(config).state_dict().items()}
    shapes |= {name: torch.Size(shape) for name, shape in checkpoints.unused_shapes(config).items()}
    return {f"module.{name}": value for name, value in seeded_state(shapes, 4).items()}


def test_a_batch_gives_what_single_images_give(parts, tmp_path):
    decoder = seg_decorder(num_classes=80, num_queries=20).to("cpu")
    decoder.load_state_dict(state_of("coco", parts), strict=True)
    controller, results = AttentionStore(), {}
    ptp_utils.register_attention_control(parts[0], controller)
    assert controller.num_att_layers == 20
    for name, chosen in (("both", (0, 1)), ("first", (0,)), ("second", (1,))):
        prompts, generators = [TEXTS[k] for k in chosen], [torch.Generator().manual_seed(k) for k in chosen]
        clear_feature_dic()
        controller.reset()
        images, _ = ptp_utils.text2image(
            *parts, prompts, controller, 2, guidance_scale=5, generator=generators, Train=False
        )
        ptp_utils.save_images(images, out_put=str(tmp_path / f"{name}.jpg"))
        average = controller.get_average_attention()
        assert [len(average[f"{place}_cross"]) for place in ("down", "mid", "up")] == [3, 1, 6]
        with torch.no_grad():
            outputs = decoder(get_feature_dic(), controller, prompts, parts[2])
        assert outputs["pred_masks"].shape[0] == len(chosen)
        results[name] = torch.cat(get_feature_dic()["low"], 1).numpy(), average["up_cross"][-1].numpy()
    for k, at_most in enumerate((1e-3, 1e-5)):
        apart = np.concatenate([results[name][k] for name in ("first", "second")])
        assert np.abs(results["both"][k] - apart).max() < at_most
    assert np.abs(results["first"][0] - results["second"][0]).max() > 0.01
    assert (tmp_path / "both.jpg").is_file()


class OwnStore:
    """A store that a script has of its own."""

    activate = True

    def reset(self):
        self.cur_step, self.attention_store = 0, {}

    def step_callback(self, latents):
        return latents

    def get_average_attention(self):
        return {key: [maps / self.cur_step for maps in layers] for key, layers in self.attention_store.items()}


def test_a_training_loop_of_datasetdm_trains_a_decoder(parts):
    with pytest.raises(RuntimeError, match="it has no weights yet"):
        Depthmodule().state_dict()
    torch.manual_seed(1)
    decoder, store, scheduler = Depthmodule(max_depth=10.0).to("cpu"), OwnStore(), parts[4]
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-4)
    metres, losses = torch.full((1, 1, 128, 128), 3.0), []
    for _ in range(2):
        clear_feature_dic()
        store.reset()
        scheduler.set_timesteps(50)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
        ptp_utils.text2image(*parts, ["a ball"], store, latent=latents, guidance_scale=5, Train=True)
        outputs = decoder(get_feature_dic(), store, ["a ball"], parts[2])
        loss = (torch.nn.functional.interpolate(outputs, (128, 128)) - metres).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    loaded = Depthmodule(max_depth=10.0)
    loaded.load_state_dict(decoder.state_dict())
    assert loaded.state_dict().keys() == decoder.state_dict().keys()
