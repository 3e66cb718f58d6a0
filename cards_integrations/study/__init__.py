"""For people who evaluate: calibration."""

from cards_integrations.study.calibrate import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
