import tempfile
from pathlib import Path

import torch


def calls(m):
    x = torch.randn(3, 512)
    path = Path(tempfile.mkdtemp()) / "some.gguf"
    metadata = {"general.architecture": "none", "a.list": [1, 2], "a.text": "b", "a.x": 0.5}
    m.write_gguf(path, metadata, {"x": x, "blocks": m.quantize(x, "Q8_0")})
    written = torch.tensor(list(path.read_bytes()))
    return [
        *((form.quantize, x) for form in m.FORMATS.values()),
        *((form.dequantize, form.quantize(x)) for form in m.FORMATS.values()),
        (torch.clone, written),
    ]
