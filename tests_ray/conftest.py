"""Where the example and the tiny models are."""

import sys
from pathlib import Path

for folder in ("tests", "cookbook"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
