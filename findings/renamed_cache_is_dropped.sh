#!/usr/bin/env bash
# A forward that still calls its cache `past_key_values` gets none from `generate`, and writes another text.
#
# transformers 5.24.0, torch 2.13.0, on a CPU; a Llama of random weights.
# Expected: 5.24 renames `past_key_values` to `cache`, and takes the old name until 5.40. So a subclass with a forward of
#   its own, or a decoder layer put in place of another, that names `past_key_values` and takes the rest as `**kwargs`, as
#   most model code does, goes on as in 5.23, or raises.
# Seen: `generate` passes `cache`, which ends in `**kwargs`. Each token is read with nothing before it, and the text is
#   another one than without a cache. Nothing is raised; the warning says that the old name will be removed in 5.40.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__)
CONFIG = LlamaConfig(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None)
PROMPT = torch.tensor([[7, 9, 20, 31]])


class OwnForward(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        out = self.model(input_ids, **given, use_cache=kwargs.get("use_cache"))
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state), past_key_values=past_key_values)


class OwnLayer(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, position_embeddings=None, **kwargs):
        given = {"past_key_values": past_key_values, "position_embeddings": position_embeddings}
        return self.layer(hidden_states, attention_mask=attention_mask, **given)


def text(model, use_cache):
    return model.generate(PROMPT, max_new_tokens=12, do_sample=False, use_cache=use_cache)[0, PROMPT.shape[1] :].tolist()


torch.manual_seed(0)
plain = LlamaForCausalLM(CONFIG).eval()
with_own_forward = OwnForward(CONFIG).eval()
with_own_forward.load_state_dict(plain.state_dict())
with_own_layers = LlamaForCausalLM(CONFIG).eval()
with_own_layers.load_state_dict(plain.state_dict())
with_own_layers.model.layers = torch.nn.ModuleList(map(OwnLayer, with_own_layers.model.layers))
MODELS = {"plain": plain, "own forward": with_own_forward, "own layers": with_own_layers}
same = {}
for name, model in MODELS.items():
    with_cache, without = text(model, True), text(model, False)
    same[name] = with_cache == without
    print(f"{name}: with a cache {with_cache}, without {without}")
assert same["plain"], "changed: the library's own forward used to be right"
assert not same["own forward"] and not same["own layers"], "changed: the cache of an old name used to be dropped"
PY
