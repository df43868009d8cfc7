"""Runs of benchmarks: ask a model, or read answers made elsewhere; judge them; compute the rates.

`evaluate` is the whole way. The folder of a run is OUT/SUBJECT/BENCHMARK/, with

- `protocol.json`: how the model was asked. A later call with another protocol is refused.
- `answers.jsonl`: one answer a line, appended as soon as it is there.
- `verdicts/JUDGE.jsonl`, and `JUDGE.json`, which describes the judge.
- `results.json`: the rates of every judge, and the protocol card.
"""
