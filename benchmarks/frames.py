"How many training samples a second one core makes. Run: OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/frames.py"
import statistics, sys, time
from types import SimpleNamespace
import numpy as np, torch
from mem_nb.config import DataConfig
from mem_nb.data import EventStore, collate, make_frames
from mem_nb.masking import block_mask

SIZE,BATCH,REPEATS = (180,240),32,15   # 32 frames of 3×224×224 float32 stay below 32 MB, above which malloc maps memory anew each time

def recording(seed, n=100_000, size=SIZE):
    "Words of a recording in which some places are busier than others, as an edge that moves leaves them."
    rng = np.random.default_rng(seed)
    h,w = size
    edges = rng.random(12)[rng.integers(0, 12, n)]
    x = (rng.normal(w*edges, 6)%w).astype(np.uint64)
    y = (rng.normal(h/2, h/4, n)%h).astype(np.uint64)
    t = np.sort(rng.integers(0, 300_000, n)).astype(np.uint64)
    return x | y<<np.uint64(12) | rng.integers(0, 2, n).astype(np.uint64)<<np.uint64(24) | t<<np.uint64(25)

def store(count=64):
    "An `EventStore` in memory."
    words = [recording(i) for i in range(count)]
    s = SimpleNamespace(packed=np.concatenate(words), offsets=np.arange(count+1)*len(words[0]), labels=np.zeros(count, np.int64), size=SIZE)
    s.slice = lambda i, max_events=None, u=.5: EventStore.slice(s, i, max_events, u)
    return s

def rate(f, n, repeats=REPEATS):
    "Median and best of so many runs: things a second."
    f()
    def once():
        start = time.perf_counter(); f()
        return n/(time.perf_counter()-start)
    found = [once() for _ in range(repeats)]
    return statistics.median(found),max(found)

def main(*names):
    data,generator = store(),torch.Generator().manual_seed(0)
    load = lambda: collate(data, np.arange(BATCH), 30000, torch.rand(BATCH, generator=generator).tolist())
    plain = dict(flip=0, time_flip=0, max_random_shift_evs=0, rand_aug=False)
    finetune = DataConfig()
    def pretrain(two):
        make_frames(load(), finetune, generator, jitter=.2, saturation=.2, two_views=two)
        block_mask((14,14), 98, generator, BATCH)
    runs = {
        'evaluation sample': (lambda: make_frames(load(), finetune), BATCH),
        'training sample, all augmentation': (lambda: make_frames(load(), finetune, generator), BATCH),
        'the same, frames moved': (lambda: make_frames(load(), DataConfig(geometry='frames'), generator), BATCH),
        'the same, time surface': (lambda: make_frames(load(), DataConfig(timesurface=True), generator), BATCH),
        'the same, voxel grid': (lambda: make_frames(load(), DataConfig(representation='voxel'), generator), BATCH),
        'pretraining sample, jitter and mask': (lambda: pretrain(False), BATCH),
        'the same, two views': (lambda: pretrain(True), BATCH),
        'block mask': (lambda: block_mask((14,14), 98, generator, 2048), 2048)}
    for name,(f,n) in runs.items():
        if not names or any(w in name for w in names): print(f'{name:40} {{:10.0f}}/s median {{:10.0f}}/s best'.format(*rate(f, n)), flush=True)

if __name__=='__main__': main(*sys.argv[1:])
