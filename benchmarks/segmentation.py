"""Segmentation: pretrained against scratch against a UNet with few labelled frames, the step of a ViT-B/16, frames a second.

.venv/bin/python benchmarks/segmentation.py --jobs 2 --json benchmarks/segmentation.json

The study stopped at any moment goes on with the same command; `--parts base,speed` are timings, to be run with nothing beside them.
On a GPU: `--parts base --device cuda --json benchmarks/segmentation_gpu.json` (batch 16, images/s and memory).
"""
import argparse, time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
import numpy as np, torch
from torch import nn
from tqdm import tqdm
from common import asked, clock, machine, record, side_by_side, table, wall_time, write
from mem_nb.config import load_config, parse_config
from mem_nb.decoder import pretrain_decoder
from mem_nb.finetune import run_name
from mem_nb.labelled import LabelledSet, class_names, labelled
from mem_nb.pipeline import run_step
from mem_nb.pyramid import build_segmenter, segmenter_optimizer
from mem_nb.segment import (_loss, frame_subset, label_batches, load_segmenter, pixel_loss, poly_schedule, predict_frames, score_numbers, segment_one,
                            segmentation_score)
from mem_nb.train import fit

CONF = Path(__file__).parents[1]/'configs'/'scenes.conf'

class UNet(nn.Module):
    "smp's UNet with the first stages of a ResNet-18, from scratch, of about the size of ours (0.9 million weights), in the clothes of a `Segmenter`."
    def __init__(self, classes, window):
        super().__init__()
        import segmentation_models_pytorch as smp
        self.net,self.classes,self.window = smp.Unet('resnet18', 3, None, decoder_channels=(64,32,16), in_channels=3, classes=classes),classes,window
        self.net.encoder.layer3,self.net.encoder.layer4 = nn.Identity(),nn.Identity()      # a depth of 3 leaves them out
    def forward_both(self, frames): return self.net(frames), None
    def forward(self, frames): return self.net(frames)

def unet(cfg, train, val, labels, seed, lr=2e-3):
    "As `segment_one`, with a UNet: same frames, augmentation, schedule, steps. Its rate was searched as the others' was (5e-4, 1e-3, 2e-3, 4e-3)."
    g = cfg.segment
    chosen = frame_subset(len(train), labels, seed)
    torch.manual_seed(seed)
    model = UNet(g.classes, cfg.seen_size)
    m = fit(model, _loss(cfg, model, None), label_batches(train, chosen, g.batch_size, seed, cfg.data.slice_max_evs), g.steps, cfg.folder/'segment'/run_name('unet', labels, seed),
            torch.optim.AdamW(model.parameters(), lr, weight_decay=.05), lambda k: poly_schedule(k, g.steps, lr, 0., g.warmup_steps), replace(cfg.run, seed=seed),
            dict(unet=1, lr=lr, seed=seed, steps=g.steps), ema_decay=g.ema_decay, validate=lambda m: score_numbers(segmentation_score(m, val, cfg.data), class_names(cfg)),
            validate_every=g.validate_every, desc=f'unet {seed}')
    return dict(method='unet', labels=str(labels), n_labels=len(chosen), seed=seed, seconds=m['seconds'], **{k[4:]:v for k,v in m.items() if k.startswith('val_')})

class Task(NamedTuple):
    "A training that one process does."
    method: str      # 'tokenizer', 'pretrain' (perhaps the decoder's, too), 'pretrained', 'scratch' or 'unet'
    labels: object = ''
    seed: int = 0
    def __str__(self): return f'{self.method} {self.labels} seed {self.seed}' if self.labels else self.method

def do(conf, words, task):
    "What a task asks for; the record of a segmentation."
    cfg = load_config(conf, words)
    if task.method in ('tokenizer','pretrain'):
        run_step(cfg, task.method)
        if task.method=='pretrain' and cfg.segment.decoder_epochs: pretrain_decoder(cfg)
        return None
    folder = labelled(cfg)
    train,val = LabelledSet(folder),LabelledSet(folder, 'val')
    return unet(cfg, train, val, task.labels, task.seed) if task.method=='unet' else segment_one(cfg, train, val, task.method, task.labels, task.seed)

def study(conf, words, jobs):
    "All three at every seed, `jobs` trainings at once. The long pretraining has all cores for itself. Gives rows, and the record of the time."
    cfg,rows = load_config(conf, words),[]
    tick = clock(kept := cfg.folder/'starts.json', jobs, len(list(cfg.folder.glob('segment/*_*/final.safetensors'))))
    run_step(cfg, 'prepare'); labelled(cfg)
    tunings = lambda method: [Task(method, n, s) for s in cfg.segment.seeds for n in cfg.segment.labels]
    def then(task, r):
        tick()
        if r: rows.append(r); tqdm.write(f"{r['method']:11s} seed {r['seed']}: mIoU {r['miou']:.3f}, accuracy {r['accuracy']:.3f}, boundary F {r['boundary_f']:.3f}, {r['seconds']:.0f} s")
    whole = 3*len(cfg.segment.seeds)*len(cfg.segment.labels)
    try:
        for tasks,at_once in (([Task('tokenizer'), *tunings('unet')], jobs), ([Task('pretrain')], 1), ([*tunings('scratch'), *tunings('pretrained')], jobs)):
            side_by_side(partial(do, conf, words), tasks, then, at_once)
    finally: tick()
    return rows, wall_time(kept, 'scenes, films to trainings', 15, len(rows), whole)

def study_records(cfg, rows):
    "What the study says of the first number of labels."
    n,seeds = cfg.segment.labels[0],len(cfg.segment.seeds)
    mean = lambda m,k='miou': 100*float(np.mean([r[k] for r in rows if r['method']==m and r['labels']==str(n)]))
    said = f'{n} labelled frames, mean of {seeds} seed{"s"*(seeds>1)}'
    gain = record(f'scenes, mIoU gained by pretraining over scratch, {said}', mean('pretrained')-mean('scratch'), 'points', goal=8.)
    best = record(f'scenes, mIoU pretrained (baseline: UNet of like size, ResNet-18, from scratch), {said}', mean('pretrained'), '%', baseline=mean('unet'), goal=mean('unet'))
    rest = [record(f'scenes, {what} {m}, {said}', mean(m, k), '%') for m in ('pretrained','scratch','unet') for k,what in (('miou','mIoU'),('boundary_f','boundary F'))]
    return [gain, best, *rest]

@torch.no_grad()
def ceilings(seconds=1.):
    "GFLOP/s that this machine does now: of matrix products, and of the decoder's largest convolution, which may be computed with fewer products than are counted."
    a,x,w = torch.randn(1536,1536),torch.randn(1,512,112,160),torch.randn(512,512,3,3)
    def rate(f, flop):
        f(); n,began = 0,time.time()
        while time.time()-began<seconds: f(); n += 1
        return flop*n/(time.time()-began)/1e9
    return np.array([rate(lambda: a@a, 2*1536**3), rate(lambda: nn.functional.conv2d(x, w, padding=1), 2*512*512*9*112*160)])

def base_step(repeats=3, device='cpu', batch=1):
    "A training step of ViT-B/16 and UPerNet at 440×640 (padded to 448), fp32, on a GPU bf16: {'ours' or 'smp': (seconds, GFLOP executed in products and in convolutions, bytes of a GPU)}."
    import mem_nb.pyramid as pyramid
    from torch.utils.flop_counter import FlopCounterMode
    from mem_nb.speed import keep_memory
    keep_memory()                                     # as every training does
    cfg = parse_config('data_set = dsec\ninput_H = 448\ninput_W = 640\nseg_norm = group\nnum_mask_patches = 98')
    model = build_segmenter(cfg).train().to(device)
    opt = segmenter_optimizer(model, 1e-4, layer_decay=.65)
    x,y = torch.rand(batch,3,448,640, device=device),torch.randint(0, 11, (batch,448,640), device=device)
    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device=='cuda'):
            logits,side = model.forward_both(x)
            loss = pixel_loss(logits, y)+.4*pixel_loss(side, y)
        loss.backward(); opt.step(); opt.zero_grad()
        if device=='cuda': torch.cuda.synchronize()
    def counted():
        with FlopCounterMode(display=False) as counter: step()
        conv = sum(n for op,n in counter.get_flop_counts()['Global'].items() if 'convolution' in str(op))/1e9
        return np.array([counter.get_total_flops()/1e9-conv, conv])
    def timed(): began = time.time(); step(); return time.time()-began
    ways,out,times = {'smp':lambda decoder,levels: decoder([None, None, *levels]), 'ours':pyramid._decode},{},{'smp':[], 'ours':[]}
    for name,pyramid._decode in ways.items():
        if device=='cuda': torch.cuda.reset_peak_memory_stats()
        out[name] = counted(),torch.cuda.max_memory_allocated() if device=='cuda' else 0
    for _ in range(repeats):                          # in turns, so that both meet the same machine; the last is ours
        for name,pyramid._decode in ways.items(): times[name].append(timed())
    return {name:(min(times[name]), *found) for name,found in out.items()}

def base_records(device='cpu', batch=1):
    """The step against the ceilings of a processor; on a GPU its images/s and memory. The baseline is smp's decoder.

    The decoder's last layer is computed with fewer products than its definition has (`joined_conv`), so shares are told of both.
    """
    if device=='cuda':
        found = base_step(10, device, batch)
        (seconds,done,memory),(usual,_,much) = found['ours'],found['smp']
        what = f"ViT-B/16 + UPerNet, 440×640, batch {batch}, bf16, {torch.cuda.get_device_name()} (baseline: smp's decoder)"
        return [record(f'{what}: training', batch/seconds, 'images/s', baseline=batch/usual), record(f'{what}: memory', memory/1e9, 'GB', baseline=much/1e9, better='lower'),
                record(f'{what}: executed FLOP/s', float(done.sum())/seconds/1e3, 'TFLOP/s')]
    top,found = ceilings(),base_step(batch=batch)
    top = np.maximum(top, ceilings())
    (seconds,done,_),(usual,gflop,_) = found['ours'],found['smp']
    print(f'ceilings {top.round()} GFLOP/s; a step is defined by {gflop.round()} GFLOP and takes {done.round()} (products, convolutions)')
    share = lambda gflop,seconds: float((gflop/top).sum())/seconds*100
    return [record(f"ViT-B/16 + UPerNet, 440×640, batch {batch}, fp32: training step (baseline: smp's decoder)", seconds, 's', baseline=usual, better='lower'),
            record("the same, executed FLOP as a share of the machine's fp32 ceilings of products and of convolutions (baseline: smp's decoder)", share(done, seconds), '%', baseline=share(gflop, usual), goal=75 if batch==1 else None),
            record('the same, FLOP of its definition as a share of these ceilings', share(gflop, seconds), '%', baseline=share(gflop, usual)),
            record('the same, FLOP/s of its definition over the ceiling of products alone', float(gflop.sum()/top[0])/seconds*100, '%')]

def speed_records(cfg):
    "Frames a second of a 480×640 recording, from raw events to label maps, with the model of scenes.conf in sliding windows and a ViT-B/16 at once."
    from mem_nb.segmented import predict_recording
    from mem_nb.scenes import World, film
    from mem_nb.simulate import simulate_events
    from mem_nb.formats import write_events
    path = cfg.folder/'speed.h5'
    world = World(size=(480,640), things=(20,25), radius_px=(20.,60.), windows=4)
    views,times,_,_ = film(world, np.random.default_rng(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_events(path, simulate_events(views, times, rng=np.random.default_rng(0)), (480,640))
    small = load_segmenter(cfg, 'pretrained', cfg.segment.labels[0], cfg.segment.seeds[0])
    base = parse_config('data_set = dsec\ninput_H = 480\ninput_W = 640\nnum_mask_patches = 98\nslice_max_evs = 1000000')
    out = []
    for name,model,d in (('small model of scenes.conf, windows of 64×96', small, cfg.data), ('ViT-B/16 + UPerNet at once', build_segmenter(base).eval(), base.data)):
        found = predict_recording(model, path, d, 50_000)
        out.append(record(f'480×640 recording, raw events to label maps, {name}', found.frames_s, 'frames/s'))
    return out

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--json'); p.add_argument('--conf', default=str(CONF)); p.add_argument('--parts', default='study,base,speed')
    p.add_argument('--device', default='cpu', choices=('cpu','cuda'), help='of the step of the ViT-B/16 (base)'); p.add_argument('--batch', type=int, help='frames of that step; 16 on a GPU, else 1')
    p.add_argument('--jobs', type=int, default=1, help='trainings of the study at once')
    p.add_argument('overrides', nargs='*', metavar='KEY=VALUE', help='settings for a trial, of which no goal is asked')
    a = p.parse_args()
    if a.device=='cuda' and (not torch.cuda.is_available() or a.parts!='base'): p.error('--device cuda needs a GPU, and --parts base')
    cfg,records,parts = load_config(a.conf, a.overrides),[],a.parts.split(',')
    if 'study' in parts:
        rows,took = study(a.conf, a.overrides, a.jobs)
        records += asked(study_records(cfg, rows) + took, [*a.overrides, *([] if Path(a.conf)==CONF else ['conf'])])
    if 'base' in parts: records += base_records(a.device, a.batch or (16 if a.device=='cuda' else 1))
    if 'speed' in parts: records += speed_records(cfg)
    print(table(records)); print('the study:', machine(a.jobs)) if 'study' in parts else None; print(machine())
    if a.json: write(a.json, records)
