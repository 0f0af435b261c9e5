"""Rounds of CIFAR-10 against a bare torch loop and other simulators; see ``__main__``."""
