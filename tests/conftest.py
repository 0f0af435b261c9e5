import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # doc_blocks.py, frames.py, updates.py ...

from jwins.wire import symbols

# The few symbols of tiny models are coded by the compiled twin as well, which is far faster;
# tests/property/test_symbols.py compares the two.
symbols._MAX_UNCOMPILED = 0

# No test loses its power supply, so none waits for the disk.
os.fsync = lambda descriptor: None
