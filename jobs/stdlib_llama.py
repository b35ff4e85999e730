"""A small Llama, from random weights, on the source of the Python standard library: the quickstart's job.

Every machine has this data, and it has real long documents. Copy the file and change what you like; then

    farspan run stdlib_llama.py
    farspan run stdlib_llama.py --set optim.steps=200 --set data.context=16k
"""

from farspan import Checkpoint, Evaluate, Optim, Parallel, RandomModel, SFTJob, TextData

job = SFTJob(
    name="stdlib-llama",
    model=RandomModel(family="llama", hidden=128, layers=2, heads=2, kv_heads=1, ffn=2048, vocab=1024),
    data=TextData("stdlib", context="8k", on_too_long="split"),
    precision="fp32",
    parallel=Parallel(sp=2, dp=1),
    optim=Optim(lr=3e-3, steps=48, warmup_steps=3, schedule="wsd", weight_decay=0.1),
    evaluate=Evaluate(every=24, max_tokens="16k"),
    checkpoint=Checkpoint(every=24),
)
