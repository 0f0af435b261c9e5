"""Imports of the fork server: modules that nodes need, except the command line, which is above this room."""

from __future__ import annotations

import gc
import os
import signal
import sys

if sys.argv[:1] == ["-c"]:  # the server itself, which Ctrl-C and the end of its terminal must not end
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"

    import jwins.experiment.load
    import jwins.net.driver
    import jwins.net.membership
    import jwins.net.status
    import jwins.run.node
    import jwins.training.allocator  # noqa: F401

    gc.collect()
    gc.freeze()  # no page is copied because an unused object was looked at
