"""For people who evaluate: calibration, methods side by side, and a judge of pairs."""

from cards_integrations.study.calibrate import calibrate
from cards_integrations.study.calibration import Calibration
from cards_integrations.study.compare import compare
from cards_integrations.study.comparison import Comparison
from cards_integrations.study.judge import Judgement, judge
from cards_integrations.study.prompts import read_prompts

__all__ = ["Calibration", "Comparison", "Judgement", "calibrate", "compare", "judge", "read_prompts"]
