"""A reward model behind HTTP: vLLM, text-embeddings-inference, or a server of one's own."""

from __future__ import annotations

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards.base import Loader, RewardModel
from cards_integrations.rewards.registry import register_reward
from cards_integrations.rewards.remote_settings import KEY, RemoteSettings
from cards_integrations.rewards.scorers.served.client import RemoteModel
from cards_integrations.rewards.scorers.served.decisions import Decision
from cards_integrations.rewards.scorers.served.pairs import Json, Score
from cards_integrations.rewards.scorers.served.steps import StepScores
from cards_integrations.rewards.scorers.served.texts import Classify, Predict
from cards_integrations.rewards.scorers.served.words import WordMargin

__all__ = ["KEY", "PROTOCOLS", "RemoteReward"]

PROTOCOLS: dict[str, type[RemoteModel]] = {
    "classify": Classify,
    "score": Score,
    "predict": Predict,
    "json": Json,
    "pooling": StepScores,
    "generative_scoring": WordMargin,
    "systemone": Decision,
}


@register_reward
class RemoteReward(RemoteSettings):
    """A reward model behind HTTP. `protocol` says who answers:

    - "classify": vLLM's POST {url}/classify; the raw score of class `label`, an index (one class: 0).
    - "score": vLLM's POST {url}/score on the prompt and the answers; raw scores, without the sigmoid.
    - "pooling": vLLM's POST {url}/pooling of a process reward model; `step_tag` is written after each step, and the
      probabilities there become one score by `aggregate`.
    - "generative_scoring": vLLM's POST {url}/generative_scoring; log p of the first of two `words` minus that of the
      second, after a rubric, as in `JudgeReward`.
    - "systemone": vLLM's POST {url}/v1/systemone; a decision model's answer to `question`.
    - "predict": text-embeddings-inference's POST {url}/predict; the raw score of `label`, a name.
    - "json": POST {url} of {"prompt": str, "context": [str], "responses": [str]} -> {"scores": [float]}.

    `api_key` is sent as a Bearer token (None: CARDS_REWARD_API_KEY, if that is set), and is not written
    with the settings.
    """

    def build(self, loader: Loader) -> RewardModel:
        model = PROTOCOLS[self.protocol](self, self.key)
        if self.tokenizer is not None:
            spec = LocalModel(model=self.tokenizer)
            model.use_tokenizer(ChatTokenizer(loader.models.tokenizer(spec)), loader.models.padding(spec))
        return model
