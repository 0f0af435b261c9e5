import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # wires.py
sys.path.insert(0, str(Path(__file__).parent.parent / "engines"))  # worlds.py
