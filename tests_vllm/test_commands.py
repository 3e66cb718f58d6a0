"""The commands that the documentation gives are commands of the vLLM that these tests run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ENVIRONMENT, PYTHON

DOCS = Path(__file__).parents[1] / "docs"
PARSE = """
import sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

given = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
validate_parsed_serve_args(given)
assert given.model_tag == sys.argv[1], given
"""


def commands() -> list[str]:
    composed = yaml.safe_load((DOCS / "docker-compose.yaml").read_text())["services"].values()
    written = (DOCS / "scaling.md").read_text().replace("\\\n", "")
    return [service["command"] for service in composed] + re.findall(r"^vllm serve (.+)$", written, re.MULTILINE)


@pytest.mark.parametrize("command", commands())
def test_vllm_takes_it(command: str) -> None:
    subprocess.run([PYTHON, "-c", PARSE, *shlex.split(command)], env=ENVIRONMENT, check=True, timeout=300)
