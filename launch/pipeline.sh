#!/usr/bin/env bash
# The whole life of a tiny assistant, from text to its answers: tokenizer, pretraining, fine-tuning on conversations, a
# reward model, PPO against it, an answer. It learns next to nothing at these sizes; every stage is there.
#
#   bash launch/pipeline.sh [FOLDER] [SETTINGS of all stages, such as --model.dtype float32]
#
# Variables, all optional:
#   STEPS     of each stage, PRETRAIN_STEPS of pretraining (40, 200); MODEL, settings of the model's size
#   TEXT      what is pretrained on; builtin:shakespeare
#   CHATS, PREFERENCES, PROMPTS   files for the stages after it; made here of a toy task where they are not given
#   GPTJAX    the gptjax command, PYTHON the interpreter that makes the toy task; gptjax, python3
# A stage that is done is gone on with, and so passed over: after an end by Ctrl-C the same command goes on.
set -euo pipefail
out=${1:-runs/pipeline}
[ $# -eq 0 ] || shift
read -ra gptjax <<<"${GPTJAX:-gptjax}"
read -ra model <<<"${MODEL:---model.num-layers 2 --model.width 64 --model.num-heads 4}"
text=${TEXT:-builtin:shakespeare} steps=${STEPS:-40}
mkdir -p "$out"

# -- A toy task: the answer to a word is the word in capitals, and a full stop; it is preferred to small letters.
[ -n "${CHATS:-}" ] && [ -n "${PREFERENCES:-}" ] && [ -n "${PROMPTS:-}" ] || "${PYTHON:-python3}" - "$out" <<'PYTHON'
import json, pathlib, random, sys

rng, out = random.Random(0), pathlib.Path(sys.argv[1])
words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 5))) for _ in range(200)]
rows = {
    "chats": [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": f"{w.upper()}."}]} for w in words],
    "preferences": [{"prompt": w, "chosen": f"{w.upper()}.", "rejected": w} for w in words],
    "prompts": [{"prompt": w} for w in words],
}
for name, lines in rows.items():
    (out / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
PYTHON

tune=(--data.length 64 --data.batch-size 16 --checkpoint.every "$steps" --evaluate.every "$steps" --steps "$steps" --optim.warmup-steps 0)
[ -e "$out/tokenizer.model" ] || "${gptjax[@]}" tokenizer train --source "$text" --out "$out" --vocab-size 512
"${gptjax[@]}" pretrain quickstart --run-dir "$out/base" --data.source "$text" --data.length 64 --steps "${PRETRAIN_STEPS:-200}" \
  --tokenizer.path "$out/tokenizer.model" --tokenizer.vocab-size 512 "${model[@]}" "$@"
"${gptjax[@]}" sft chat --init "$out/base" --run-dir "$out/sft" --data.source "${CHATS:-$out/chats.jsonl}" \
  --tokenizer.template llama2 --optim.learning-rate 1e-3 "${tune[@]}" "$@"
"${gptjax[@]}" reward chat --init "$out/sft" --run-dir "$out/reward" --data.source "${PREFERENCES:-$out/preferences.jsonl}" \
  --optim.learning-rate 1e-3 "${tune[@]}" "$@"
"${gptjax[@]}" ppo chat --init "$out/sft" --run-dir "$out/ppo" --data.source "${PROMPTS:-$out/prompts.jsonl}" \
  --rewards.sources "$out/reward" --value.init "$out/reward" --ptx.source init --rollout.max-new-tokens 16 \
  --rollout.minibatches 2 --optim.learning-rate 3e-4 "${tune[@]}" "$@"
"${gptjax[@]}" generate "$out/ppo" --chat --prompt abcd --max-new-tokens 16
