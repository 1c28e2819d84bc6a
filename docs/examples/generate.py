"""One image and its labels, as arrays."""

import numpy as np
from PIL import Image

from datasetdm_fast import Pipeline

pipe = Pipeline.from_pretrained("demo")  # or a diffusers folder, with decoder="FOLDER"
out = pipe(["a red ball beside a cube"], seeds=[7], steps=10)
Image.fromarray(out.images[0]).save("image.png")
classes = out.semantic[0].classes
for number in np.unique(out.semantic[0].labels):
    print(classes[number] if number < len(classes) else "ignored")
print(len(out.instances[0].masks), "instances,", f"{out.depth[0].metres.mean():.2f} m away on average")
