"""Runs of benchmarks: get the answers of a model, judge the answers, and compute the rates.

The function `evaluate.evaluate` does all of this. A subject is what is evaluated, such as a model
or a file of answers. Each subject and benchmark has a folder OUT/SUBJECT/BENCHMARK/ with the files

- `protocol.json`: how the model was asked. A later call with another protocol is refused.
- `answers.jsonl`: one answer a line. A batch of answers is appended as soon as it is generated.
- `verdicts/JUDGE.jsonl`: one verdict of a judge a line. JUDGE is `BenchmarkJudge.file`.
- `verdicts/JUDGE.json`: the description of this judge.
- `results.json`: the rates of every judge, and the protocol card.
"""
