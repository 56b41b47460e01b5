import tempfile

import torch


def calls(m):
    from safetensors.torch import save_file

    folder = tempfile.mkdtemp()
    save_file({"a": torch.randn(3, 5), "b": torch.arange(4)}, f"{folder}/model.safetensors")
    return [
        (m.read_tensors, folder, torch.bfloat16),
        (m.scaling_of, {"type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    ]
