"""How well image and prompt fit each other by a CLIP of transformers from a local folder; the only score with torch."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasetdm_fast.cores import in_blocks
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.run_folder.reader import StoredSample

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images that CLIP was trained on
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
BATCH = 16
NEEDED = "It needs config.json, model.safetensors and the files of its tokenizer."


def digest_of(folder: Path) -> str:
    """SHA-256 of the files of a CLIP's folder that decide its scores, in the order of their names."""
    if not (folder / "config.json").is_file():
        raise Refused(
            f"--clip {folder}: holds no config.json",
            "Name a folder with a CLIP as transformers saves it, such as a copy of openai/clip-vit-base-patch32.",
        )
    paths = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".txt", ".safetensors"))
    digests = ((path.name, storage.sha256_of(path)) for path in paths)
    return hashlib.sha256(json.dumps(list(digests)).encode()).hexdigest()


class Clip:
    """A CLIP with its tokenizer; its images are scaled and cropped as in its training."""

    def __init__(self, folder: Path, digest: str):
        self.digest = digest
        from transformers import AutoTokenizer, CLIPModel

        from datasetdm_fast.engine.engines.device import set_threads

        set_threads(0)
        try:
            options = {"local_files_only": True, "trust_remote_code": False}
            model, report = CLIPModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        except Exception as error:  # transformers raises nearly anything
            raise Missing(
                f"--clip {folder}: transformers cannot read it ({type(error).__name__}: {error})", NEEDED
            ) from error
        if absent := sorted(report["missing_keys"]):  # which transformers initialises at random
            raise Missing(
                f"--clip {folder}: it lacks {count_noun(len(absent), 'tensor')} of a CLIP, such as {absent[0]}", NEEDED
            )
        self.model = model.eval()
        self.side: int = self.model.config.vision_config.image_size
        self.length: int = self.model.config.text_config.max_position_embeddings

    def scores(self, samples: Sequence[StoredSample]) -> list[float]:
        """The cosine of image and prompt of each sample; a prompt that is too long is cut."""
        import torch

        cosines: list[float] = []
        for block in in_blocks(samples, BATCH):
            pixels = torch.from_numpy(np.stack([self._pixels(sample.image) for sample in block]))
            prompts = [sample.prompt for sample in block]
            text = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
            with torch.inference_mode():
                output = self.model(
                    input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=pixels
                )
            cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)
            cosines += [round(value, 6) for value in cosine.tolist()]
        return cosines

    def _pixels(self, image: np.ndarray) -> np.ndarray:  # [3, side, side] float32
        whole = Image.fromarray(image)
        scale = self.side / min(whole.size)
        whole = whole.resize(
            (max(round(whole.width * scale), self.side), max(round(whole.height * scale), self.side)),
            Image.Resampling.BICUBIC,
        )
        left, top = (whole.width - self.side) // 2, (whole.height - self.side) // 2
        crop = np.asarray(whole.crop((left, top, left + self.side, top + self.side)), np.float32) / 255
        return ((crop - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)).transpose(2, 0, 1)
