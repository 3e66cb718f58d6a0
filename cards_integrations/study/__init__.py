"""For people who evaluate: calibration, methods side by side, a judge of pairs, and value heads."""

from cards_integrations.study.calibrate import calibrate
from cards_integrations.study.calibration import Calibration
from cards_integrations.study.compare import compare
from cards_integrations.study.comparison import Comparison
from cards_integrations.study.judge import Judgement, judge
from cards_integrations.study.prompts import read_prompts
from cards_integrations.study.train_value import TrainedValue, train_value

__all__ = [
    "Calibration",
    "Comparison",
    "Judgement",
    "TrainedValue",
    "calibrate",
    "compare",
    "judge",
    "read_prompts",
    "train_value",
]
