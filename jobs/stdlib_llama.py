"""A small Llama, from random weights, on the source of the Python standard library: the quickstart's job.

Every machine has this data, and it has real long documents. Copy the file and change what you like; then

    farspan run stdlib_llama.py
    farspan run stdlib_llama.py --set optim.steps=200 --set data.context=16k
"""

from farspan import Checkpoint, Evaluate, Optim, Parallel, RandomModel, SFTJob, TextData

job = SFTJob(
    name="stdlib-llama",
    model=RandomModel(family="llama", hidden=256, layers=4, heads=8, kv_heads=4, ffn=688, vocab=4096),
    data=TextData("stdlib", context="8k", on_too_long="split"),
    precision="fp32",
    parallel=Parallel(sp=2, dp=1),
    optim=Optim(lr=3e-3, steps=40, warmup_steps=4, schedule="wsd", weight_decay=0.1),
    evaluate=Evaluate(every=20, max_tokens="32k"),
    checkpoint=Checkpoint(every=20),
)
