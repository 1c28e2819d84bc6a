"""The diffusion model's features of a picture, for a network of your own."""

from pathlib import Path

import numpy as np
from PIL import Image

from datasetdm_fast import Pipeline

picture = np.array(Image.open(sorted(Path("runs/demo/images").iterdir())[0]).convert("RGB"))
pipe = Pipeline.from_pretrained("demo")
for level, values in pipe.features(picture, prompt="a ball", timestep=100).items():
    print(f"{level:8} {values.shape[1]} channels of {values.shape[2]} x {values.shape[3]}")
