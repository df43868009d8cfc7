"""Let torchvision's wheel from PyPI be imported without CUDA: `make test-vllm` runs this.

PyPI has torchvision for CUDA only. Without CUDA's libraries its operators are not loaded, and the
import fails where two of them get a second implementation. vLLM imports torchvision and calls
neither, so it is enough to declare them. PyTorch's own wheels for CPUs need no change.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

DECLARED = """

if not _has_ops():  # declared by scripts/torchvision_on_cpu.py, and never called
    for _name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
"""


def main() -> None:
    """Change the installed file if the import fails without the change."""
    if subprocess.run([sys.executable, "-c", "import torchvision"], check=False).returncode:
        [folder] = importlib.util.find_spec("torchvision").submodule_search_locations
        path = Path(folder) / "extension.py"
        path.write_text(path.read_text(encoding="utf-8") + DECLARED, encoding="utf-8")


if __name__ == "__main__":
    main()
