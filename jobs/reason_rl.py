"""A small reasoner: it learns to do sums in writing, and then, by RL, to write no more than it needs.

A model of random weights first learns from demonstrations, most of which write every step down and check it. RL then
rewards right answers; LASER-D pays extra for those that keep within a target length, which it finds by itself and by
difficulty. Everything runs on two CPU cores in minutes. Copy the file and change what you like; then

    farspan run reason_rl.py
    farspan run reason_rl.py --set reward.shaper.type=none --set name=reason-plain
"""

from farspan import (
    Arithmetic,
    LaserD,
    Optim,
    Parallel,
    PolicyLoss,
    RandomModel,
    Reward,
    RLEvaluate,
    RLJob,
    Rollout,
    WarmStart,
)

job = RLJob(
    name="reason-rl",
    model=RandomModel(family="llama", hidden=96, layers=2, heads=4, kv_heads=4, ffn=384, vocab=260, rope_theta=1000.0),
    task=Arithmetic(steps=(3, 3), full=0.5, short=0.45),
    warm_start=WarmStart(
        examples=48_000,
        context="1k",
        optim=Optim(lr=3e-3, steps=3000, weight_decay=0.01),
        parallel=Parallel(sp=1, dp=1),
    ),
    precision="fp32",
    rollout=Rollout(cap=96, group_size=8, prompts_per_step=32),
    reward=Reward(shaper=LaserD(lower=20, step=4), monitor_every=10),
    loss=PolicyLoss(aggregation="dapo"),
    context="2k",
    parallel=Parallel(sp=1, dp=1),
    optim=Optim(lr=2e-4, steps=200, warmup_steps=5),
    evaluate=RLEvaluate(prompts=4096),
)
