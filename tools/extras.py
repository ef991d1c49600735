"""Prints what the extras named on the command line require, one a line, for `pip install -r`: no second build."""

import sys
from importlib.metadata import requires

wanted = {f"extra == {quote}{name}{quote}" for name in sys.argv[1:] for quote in "'\""}
for line in requires("dsct-kernels") or []:
    requirement, _, condition = line.partition(";")
    if condition.strip() in wanted:
        print(requirement.strip())
