"""vLLM in a process of its own: JSON lines in, JSON lines out. Needs vLLM and nothing of this repository.

The first line of stdin holds the arguments of `vllm.LLM`; `{"ready": true, "version": ...}` answers it. Every further
line is a rollout, `{"prompt_ids": [[...]], "lengths": [...]}`, answered by `{"completion_ids": [[...]]}`.
An exception ends the process after `{"error": "..."}`. vLLM prints to stdout, which therefore goes to stderr.
"""

import json
import os
import sys
from typing import Any, TextIO


def serve(requests: TextIO, answers: TextIO) -> None:
    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        import vllm
        from vllm import LLM, SamplingParams
        from vllm.inputs import TokensPrompt

        llm = LLM(**json.loads(requests.readline()))
        answer(ready=True, version=vllm.__version__)
        for line in requests:
            work = json.loads(line)
            prompts = [TokensPrompt(prompt_token_ids=ids) for ids in work["prompt_ids"]]
            # No seed per request: vLLM would then draw row by row.
            params = [
                SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False)
                for n in work["lengths"]
            ]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            answer(completion_ids=[list(output.outputs[0].token_ids) for output in outputs])
    except BaseException as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # modules here must not shadow vLLM's imports
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    own_stdout = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(own_stdout, "w") as answers:
        serve(sys.stdin, answers)
