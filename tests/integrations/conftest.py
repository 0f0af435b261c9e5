import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # pairs.py
sys.path.insert(0, str(Path(__file__).parent.parent / "net"))  # members.py
