"How many training samples a second one core makes: 180×240 to 224×224, 30 000 of 100 000 events. OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/frames.py"
import argparse, statistics, time
from types import SimpleNamespace
import numpy as np, torch
from common import machine, record, table, write
from mem_nb.config import DataConfig
from mem_nb.data import collate, make_frames
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

def store(count=64, n=100_000):
    "What `collate` asks of an `EventStore`, in memory."
    words = [recording(i, n) for i in range(count)]
    def cut(i, max_events, u): start = int(u*(n-max_events+1)); return words[i][start:start+max_events]
    return SimpleNamespace(slice=cut, labels=np.zeros(count, np.int64), size=SIZE)

def rate(f, n, repeats=REPEATS):
    "Median of so many runs: things a second of processor time, so that neighbours on the machine count for less."
    f()
    def once():
        start = time.process_time(); f()
        return n/(time.process_time()-start)
    return statistics.median(once() for _ in range(repeats))

def main(names=(), json=None):
    data,generator = store(),torch.Generator().manual_seed(0)
    load = lambda: collate(data, np.arange(BATCH), 30000, torch.rand(BATCH, generator=generator).tolist())
    def frames(augment=True, **kw): return lambda: make_frames(load(), DataConfig(**kw), generator if augment else None)
    def pretrain(two):
        make_frames(load(), DataConfig(), generator, jitter=.2, saturation=.2, two_views=two)
        block_mask((14,14), 98, generator, BATCH)
    runs = {
        'evaluation sample': (frames(augment=False), BATCH, None),
        'training sample': (frames(), BATCH, 1300),
        'training sample, frames moved': (frames(geometry='frames'), BATCH, None),
        'training sample, time surface': (frames(timesurface=True), BATCH, None),
        'training sample, voxel grid': (frames(representation='voxel'), BATCH, None),
        'pretraining sample, jitter and mask': (lambda: pretrain(False), BATCH, 1000),
        'pretraining sample, two views': (lambda: pretrain(True), BATCH, 1000),
        'block mask': (lambda: block_mask((14,14), 98, generator, 2048), 2048, 150_000)}
    records = [record(name, rate(f, n), '/s', goal=goal) for name,(f,n,goal) in runs.items() if not names or any(w in name for w in names)]
    print(table(records), machine(), sep='\n\n')
    if json: write(json, records)

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('names', nargs='*', help='only what holds one of these words')
    parser.add_argument('--json')
    args = parser.parse_args()
    torch.set_num_threads(1)
    main(args.names, args.json)
