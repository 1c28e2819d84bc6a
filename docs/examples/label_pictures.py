"""Labels of pictures that exist."""

from pathlib import Path

from PIL import Image

from datasetdm_fast import Pipeline

paths = sorted(Path("runs/demo/images").iterdir())[:2]  # your own pictures
pipe = Pipeline.from_pretrained("demo")
out = pipe.label([Image.open(path) for path in paths], "a ball and a cube", tasks=("semantic", "depth"))
for path, semantic, depth in zip(paths, out.semantic, out.depth):
    print(path.name, semantic.labels.shape, f"{depth.metres.max():.2f} m")
