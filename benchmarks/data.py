"""The data layer against the plain way of doing it, and against other readers where they are installed.

OMP_NUM_THREADS=1 python benchmarks/data.py --json benchmarks/data.json            # some minutes, 3 GB of disk
OMP_NUM_THREADS=1 python benchmarks/data.py --parts decode prepare                 # only these
OMP_NUM_THREADS=1 python benchmarks/data.py --parts memory --events 2e9            # a recording as long as memory allows nobody to hold

Decoding, samples and masks run on one core; prepare takes all there are. The plain way is written here: a Python loop over
events, float64 storage, np.add.at. It is timed on fewer events, and compared as a rate. Each figure is the best of a few runs.
"""
import argparse, os, shutil, statistics, struct, subprocess, sys, tempfile, time
from importlib.util import find_spec
from pathlib import Path
import numpy as np
from common import machine, record, table, write

HERE = Path(__file__).resolve().parent

def best(f, runs=5):
    "Seconds of the fastest of some runs, after one that warms up."
    f()
    def once(): start = time.perf_counter(); f(); return time.perf_counter()-start
    return min(once() for _ in range(runs))

def some_events(n, seed=0, size=(180,240), span=300_000):
    "Events that move as an edge does: some places are busier than others."
    from mem_nb.events import make_events
    rng = np.random.default_rng(seed)
    h,w = size
    x = (rng.normal(w*rng.random(12)[rng.integers(0, 12, n)], w/40) % w).astype(int)
    return make_events(x, rng.normal(h/2, h/4, n).astype(int) % h, np.sort(rng.integers(0, span, n)), rng.integers(0, 2, n))

# ---- the plain way
def plain_bin(path):
    "Decode `.bin` an event at a time: float64 rows of x, y, t, p."
    raw,rows = Path(path).read_bytes(),[]
    for i in range(0, len(raw), 5):
        x,y,a,b,c = raw[i:i+5]
        rows.append([x, y, (a&0x7f)<<16 | b<<8 | c, 1 if a>>7 else -1])
    return np.array(rows, np.float64)

def plain_dat(path):
    "Decode DAT an event at a time."
    raw,rows = Path(path).read_bytes(),[]
    start = 0
    while raw[start:start+1]==b'%': start = raw.index(b'\n', start)+1
    for i in range(start+2, len(raw), 8):
        t,word = struct.unpack_from('<II', raw, i)
        rows.append([word & 0x3fff, word>>14 & 0x3fff, t, word>>28])
    return np.array(rows, np.float64)

def plain_frame(rows, size, input_size, rng, augment=True):
    "One training sample: slice, flip, reversal, shift, np.add.at, resize, hot pixels, normalisation, RandAugment."
    import torch
    from torchvision.transforms import v2
    start = rng.integers(0, max(1, len(rows)-30000))
    e = rows[start:start+30000].copy()
    if augment and rng.random()<.5: e = e[::-1].copy(); e[:,2] = e[0,2]-e[:,2]; e[:,3] *= -1
    if augment and rng.random()<.5: e[:,0] = size[1]-1-e[:,0]
    if augment: e[:,:2] += rng.integers(-8, 9, 2)
    e = e[(e[:,0]>=0)&(e[:,0]<size[1])&(e[:,1]>=0)&(e[:,1]<size[0])]
    counts = np.zeros((3,*size))
    for c,p in ((0,1),(2,-1)):
        f = e[e[:,3]==p].astype(int)
        np.add.at(counts[c], (f[:,1], f[:,0]), 1)
    x = v2.functional.resize(torch.from_numpy(counts).float()/255, input_size, antialias=True)
    both = x[::2]
    hot = (both>both.mean()+10*both.std()).any(0)
    x[:,hot] = 0
    x = x/x.max()
    return v2.RandAugment(2, 20)((x*255).to(torch.uint8)).float()/255 if augment else x

def plain_mask(grid, n, rng):
    "Block masks as BEiT draws them, a patch at a time."
    mask = np.zeros(grid, int)
    while mask.sum()<n:
        for _ in range(10):
            area,ratio = rng.uniform(16, max(17, n-mask.sum())),np.exp(rng.uniform(np.log(.3), -np.log(.3)))
            h,w = round((area*ratio)**.5),round((area/ratio)**.5)
            if h<grid[0] and w<grid[1]:
                y,x = rng.integers(0, grid[0]-h+1),rng.integers(0, grid[1]-w+1)
                for i in range(y, y+h):
                    for j in range(x, x+w):
                        if not mask[i,j] and mask.sum()<n: mask[i,j] = 1
                break
    return mask

# ---- decoding
def peers(kind, path):
    "Other readers of a file, as functions."
    found = {}
    if kind=='bin' and find_spec('tonic'):
        from tonic.io import read_mnist_file
        found['tonic'] = lambda: read_mnist_file(str(path), dtype=np.dtype([('x',int),('y',int),('t',int),('p',int)]))
    if kind in ('dat','evt2','evt3') and find_spec('faery'):
        import faery
        found['faery'] = lambda: [None for _ in faery.events_stream_from_file(path)]
    if kind=='evt3' and find_spec('evt3'):
        import evt3
        found['evt3'] = lambda: evt3.decode_file(str(path))
    return found

def decode(tmp):
    "Whole files to event arrays, on one core."
    from mem_nb import formats
    n,small,out = 5_000_000,some_events(200_000),[]
    events = some_events(n, span=8_000_000)
    plain = dict(bin=plain_bin, dat=plain_dat)
    goals = dict(bin=150, dat=150, evt2=None)
    for kind,suffix in (('bin','.bin'),('dat','.dat'),('evt2','.raw')):
        formats.write_events(tmp/f'long{suffix}', events); formats.write_events(tmp/f'short{suffix}', small)
        slow = 200_000/best(lambda: plain[kind](tmp/f'short{suffix}'), 2)/1e6 if kind in plain else None
        ours = n/best(lambda: formats.read_events(tmp/f'long{suffix}'))/1e6
        out.append(record(f'decode {kind}, 5 M events, one core, against a Python loop', ours, 'M events/s', slow, goals[kind]))
        for name,f in peers(kind, tmp/f'long{suffix}').items():
            out.append(record(f'decode {kind}, against {name}', ours, 'M events/s', n/best(f, 3)/1e6))
    return out + decode_evt3(tmp, events[:2_000_000])

def decode_evt3(tmp, events):
    "EVT3; faery writes the file."
    if not find_spec('faery'): print('EVT3: left out, since faery is not installed to write a file'); return []
    import faery
    from mem_nb import formats
    a = np.empty(len(events), faery.EVENTS_DTYPE)
    a['t'],a['x'],a['y'],a['on'] = events['t'],events['x'],events['y'],events['p']
    faery.events_stream_from_array(a, dimensions=(240,180)).to_file(tmp/'long3.raw', version='evt3')
    n,path = len(events),tmp/'long3.raw'
    ours = n/best(lambda: formats.read_events(path))/1e6
    out = [record('decode EVT3, 2 M events, one core', ours, 'M events/s', goal=60)]
    return out + [record(f'decode EVT3, against {k}', ours, 'M events/s', n/best(f, 3)/1e6) for k,f in peers('evt3', path).items()]

# ---- prepare
def command(*words, **env):
    "Run mem_nb in a process of its own: seconds, and MB of its largest process."
    start = time.perf_counter()
    code = 'import re, resource, sys; from mem_nb.pipeline import main; main(sys.argv[1:]); ' + \
           'own = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]); ' + \
           'print("peak", max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))'   # ru_maxrss of oneself would count the process before exec
    done = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, text=True, env={**os.environ, **env}, check=True)
    return time.perf_counter()-start, int(done.stdout.split()[-1])/1024

def prepared(tmp, root, data_set='folder', more=()):
    "Seconds and MB of `mem_nb prepare` on a folder, into an empty place."
    conf = tmp/'bench.conf'
    conf.write_text(f'data_path = {root}\ndata_set = {data_set}\nsensor_H = 180\nsensor_W = 240\nruns_dir = {tmp}/runs\n' + '\n'.join(more))
    shutil.rmtree(tmp/'runs', ignore_errors=True)
    return command('prepare', str(conf), TQDM_DISABLE='1')

def fill(root, files, events, seed=0):
    "A folder of ten classes; the same twenty recordings under many names."
    from mem_nb.formats import write_bin
    kinds = []
    for i in range(20):
        write_bin(root.with_name('one.bin'), some_events(events, seed+i)); kinds.append(root.with_name('one.bin').read_bytes())
    for i in range(files):
        (root/f'class{i%10}').mkdir(parents=True, exist_ok=True)
        (root/f'class{i%10}'/f'{i:06d}.bin').write_bytes(kinds[i%20])
    return root

def prepare(tmp):
    "1000 files of 100,000 events, the whole command."
    root = fill(tmp/'many', 1000, 100_000)
    start = time.perf_counter()
    for p in sorted(root.glob('*/*.bin'))[:4]: np.save(tmp/'plain.npy', plain_bin(p))
    slow,cores = 4e5/(time.perf_counter()-start)/1e6*len(os.sched_getaffinity(0)),len(os.sched_getaffinity(0))
    plain_bytes = (tmp/'plain.npy').stat().st_size/1e5
    prepared(tmp, root)
    runs = [prepared(tmp, root) for _ in range(5)]
    stored = sum(p.stat().st_size for p in (tmp/'runs').rglob('*') if p.is_file())/1e8
    out = [record(f'prepare, 1000 files of 100k events, {cores} cores, whole command', 1e8/min(s for s,_ in runs)/1e6, 'M events/s', slow, 60),
           record('the same, median of 5 runs', 1e8/statistics.median(s for s,_ in runs)/1e6, 'M events/s', slow, 60),
           record('bytes an event on disk, index and manifest included', stored, 'bytes', plain_bytes, 8.1, 'lower'),
           record('prepare, memory of its largest process', max(m for _,m in runs), 'MB', goal=300, better='lower')]
    shutil.rmtree(root)
    return out

# ---- samples
def samples(tmp, num=64, n=100_000):
    "Training and pretraining samples at 224×224, from the store, on one core."
    import torch
    from mem_nb.config import DataConfig
    from mem_nb.data import collate, make_frames
    from mem_nb.masking import block_mask
    from mem_nb.store import EventStore
    torch.set_num_threads(1)
    fill(tmp/'samples', num, n)
    prepared(tmp, tmp/'samples')
    store = EventStore(next((tmp/'runs'/'stores').glob('folder-*')))
    d,g,rng,b = DataConfig(),torch.Generator().manual_seed(0),np.random.default_rng(0),32
    load = lambda: collate(store, np.arange(b), d.slice_max_evs, torch.rand(b, generator=g).tolist())
    def pretraining(two):
        make_frames(load(), d, g, jitter=.2, **({'two_views':True} if two else {}))
        block_mask((14,14), 98, g, b)
    rows = [plain_bin(p) for p in sorted((tmp/'samples').glob('*/*.bin'))[:4]]
    slow = 8/best(lambda: [plain_frame(rows[i%4], (180,240), (224,224), rng) for i in range(8)], 3)
    mask = 50/best(lambda: [plain_mask((14,14), 98, rng) for _ in range(50)], 3)
    out = [record('training sample, 224×224, all augmentation, one core', b/best(lambda: make_frames(load(), d, g), 9), 'samples/s', slow, 1300),
           record('the same, frames interpolated as in the original', b/best(lambda: make_frames(load(), DataConfig(geometry='frames'), g), 5), 'samples/s', slow),
           record('the same, with a time surface', b/best(lambda: make_frames(load(), DataConfig(timesurface=True), g), 5), 'samples/s', slow),
           record('evaluation sample', b/best(lambda: make_frames(load(), d), 9), 'samples/s', 8/best(lambda: [plain_frame(rows[i%4], (180,240), (224,224), rng, False) for i in range(8)], 3)),
           record('pretraining sample, jitter and mask, one core', b/best(lambda: pretraining(False), 9), 'samples/s', slow, 1000),
           record('pretraining sample, two views, jitter and mask', b/best(lambda: pretraining(True), 9), 'samples/s', slow, 1000),
           record('block mask, 98 of 14×14, one core', 2048/best(lambda: block_mask((14,14), 98, g, 2048), 5), 'masks/s', mask, 150_000)]
    if torch.cuda.is_available(): out += on_gpu(load, d)
    return out + counting(n)

def counting(n):
    "An event array to counts a pixel and polarity: one np.bincount here, np.add.at in tonic."
    if not find_spec('tonic'): print('ToFrame: left out, since tonic is not installed'); return []
    from mem_nb.frames import event_histogram
    from tonic.transforms import ToFrame
    events,theirs = some_events(n),ToFrame(sensor_size=(240,180,2), event_count=n)
    assert np.array_equal(theirs(events)[0][::-1], event_histogram(events, (180,240)))
    ours = n/best(lambda: event_histogram(events, (180,240)), 20)/1e6
    return [record(f"counts of {n:,} events, one core, against tonic's ToFrame", ours, 'M events/s', n/best(lambda: theirs(events))/1e6)]

def on_gpu(load, d):
    "Packed events uploaded, frames made there."
    import torch
    from mem_nb.data import make_frames
    g,batch = torch.Generator('cuda').manual_seed(0),load()
    def once(): make_frames(batch.to('cuda'), d, g); torch.cuda.synchronize()
    return [record('training sample on a GPU, events uploaded packed', len(batch)/best(once, 20), 'samples/s', goal=20_000)]

# ---- memory, growth
def memory(tmp, events):
    "One long recording, cut into windows: memory of prepare; the file is DAT, written a piece at a time."
    from mem_nb.formats import DAT
    root,n = tmp/'long'/'x',int(events)
    root.mkdir(parents=True)
    with open(root/'ten_minutes.dat', 'wb') as f:
        f.write(b'% Width 240\n% Height 180\n' + bytes([12,8]))
        for k in range(0, n, 10**6):
            r = np.empty(min(10**6, n-k), DAT)
            i = np.arange(k, k+len(r))
            r['t'],r['word'] = i*600_000_000//n, (i*7%240) | (i*13%180)<<14 | (i&1)<<28
            r.tofile(f)
    seconds,mb = prepared(tmp, tmp/'long', 'recordings', ('window_us = 50000','val_fraction = 0'))
    shutil.rmtree(tmp/'long'); shutil.rmtree(tmp/'runs')
    return [record(f'one recording of ten minutes, {n:.0e} events, memory of the largest process', mb, 'MB', n*32/1e6, 1000, 'lower'),
            record(f'the same, speed of prepare (one file: one core)', n/seconds/1e6, 'M events/s')]

def growth(tmp, most_files=10**5):
    "Samples a second for longer recordings, files a second for more of them; and a picture of both."
    import torch
    from mem_nb.config import DataConfig
    from mem_nb.data import collate, make_frames
    from mem_nb.store import EventStore
    torch.set_num_threads(1)
    d,g,rates,files = DataConfig(),torch.Generator().manual_seed(0),{},{}
    for n in (10**4,10**5,10**6,10**7):
        shutil.rmtree(tmp/'grow', ignore_errors=True)
        for c in 'ab':
            (tmp/'grow'/c).mkdir(parents=True)
            for i in range(2): np.save(tmp/'grow'/c/f'{i}.npy', some_events(n, i, span=3*n))
        prepared(tmp, tmp/'grow', more=('val_fraction = 0.5',))
        store = EventStore(next((tmp/'runs'/'stores').glob('folder-*')))
        rates[n] = 32/best(lambda: make_frames(collate(store, np.arange(32)%2, d.slice_max_evs, torch.rand(32, generator=g).tolist()), d, g), 5)
    for n in [k for k in (10**2,10**3,10**4,10**5) if k<=most_files]:
        shutil.rmtree(tmp/'grow', ignore_errors=True)
        fill(tmp/'grow', n, 1000)
        files[n] = n/min(prepared(tmp, tmp/'grow')[0] for _ in range(2))
    shutil.rmtree(tmp/'grow')
    draw(rates, files)
    return [record(f'training samples from files of {n:,} events', r, 'samples/s', rates[10**5]) for n,r in rates.items()] + \
           [record(f'prepare {n:,} files of 1000 events, whole command', r, 'files/s') for n,r in files.items()]

def draw(rates, files):
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    from mem_nb.viz import style
    with style():
        fig,(a,b) = plt.subplots(1, 2, figsize=(9,3), layout='constrained')
        a.loglog(list(rates), list(rates.values()), 'o-'); b.loglog(list(files), list(files.values()), 'o-')
        a.set(xlabel='events a recording', ylabel='training samples / s', title='A longer recording costs nothing', ylim=(10,1e4))
        b.set(xlabel='files of 1000 events', ylabel='files / s', title='prepare: start-up counts, then files do')
        for ax in (a,b): ax.grid(True)
        fig.savefig(HERE.parent/'docs'/'images'/'data_growth.png', dpi=110)
    print('picture: docs/images/data_growth.png')

PARTS = ('decode','prepare','samples','memory','growth')

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', nargs='+', default=PARTS, choices=PARTS)
    parser.add_argument('--events', type=float, default=1e8, help='of the long recording')
    parser.add_argument('--files', type=float, default=1e5, help='most files of the growth part')
    parser.add_argument('--tmp', help='folder for scratch files; default: the temporary folder')
    parser.add_argument('--json', help='file for the records')
    args = parser.parse_args()
    records = []
    for part in args.parts:
        with tempfile.TemporaryDirectory(dir=args.tmp) as tmp:
            extra = dict(memory=(args.events,), growth=(int(args.files),)).get(part, ())
            records += globals()[part](Path(tmp), *extra)
            print(table(records[-12:]), flush=True)
    print(table(records)); print(machine())
    if args.json: write(args.json, records); print(f'records: {args.json}')
