"What is asked about hidden patches: what counts, what is normalised, what stands beside an accuracy."
from types import SimpleNamespace
import numpy as np, pytest, torch
from torch import nn
from conftest import TINY
from mem_nb.config import DataConfig, parse_config
from mem_nb.encoder import from_patches, to_patches
from mem_nb.pretrain import PixelTask, TokenTask, pretrain_optimizer, strip
from mem_nb.state import check_settings, step_settings
from mem_nb.targets import (commonest_share, counted_mean, filled_patches, hidden_pixels, masked_accuracy, masked_loss, outcome,
                            patch_scale, pixel_loss)

def some(seed=0):
    "Frames half of whose patches are empty, masks of 8 of 16 patches."
    g = torch.Generator().manual_seed(seed)
    frames = to_patches(torch.rand(3,3,32,32, generator=g), 8)*(torch.rand(3,16,1, generator=g)<.5)
    return from_patches(frames, (32,32)),torch.rand(3,16, generator=g).argsort(1)<8

# ---- normalised pixels
def test_normalised_pixels_equal_the_original(shared):
    "The recorded loss of the original's norm_pix_loss, from its own prediction."
    z = np.load(shared/'golden'/'mae.npz')
    x,mask = torch.from_numpy(z['x']),torch.from_numpy(z['masked_normpix/mask']).bool()
    painted = to_patches(torch.from_numpy(z['masked_normpix/pred_img']), 8)[mask]
    torch.testing.assert_close(pixel_loss(painted, x, mask, norm_pix=True), torch.tensor(float(z['masked_normpix/loss'])), atol=1e-5, rtol=0)

def test_normalised_pixels_forget_brightness_and_come_back():
    frames,mask = some()
    target,plain = hidden_pixels(frames, mask, True),hidden_pixels(frames, mask)
    filled = filled_patches(frames, mask)
    torch.testing.assert_close(target[filled], hidden_pixels(frames*.5+.0, mask, True)[filled], atol=1e-3, rtol=0)
    mean,std = patch_scale(plain)
    torch.testing.assert_close(target*std+mean, plain, atol=1e-5, rtol=0)
    assert (target[~filled]==0).all() and torch.isfinite(target).all()

def painter_task(monkeypatch, frames, **kw):
    task = PixelTask(range(3), range(3), DataConfig(input_H=32, input_W=32), (4,4), 'random', 8, **kw)
    monkeypatch.setattr(PixelTask, 'shown', lambda self, store, device, limit=0: iter([frames[:2],frames[2:]]))
    return task

@pytest.mark.parametrize('norm_pix', [False, True])
def test_the_mean_frame_is_judged_on_the_same_target(monkeypatch, norm_pix):
    "Whoever paints the mean target scores exactly `mean_frame`."
    frames,mask = some()
    task = painter_task(monkeypatch, frames, norm_pix=norm_pix)
    every = torch.ones_like(mask)
    want = hidden_pixels(frames, every, norm_pix).view(3,16,-1).mean(0)
    torch.testing.assert_close(task.mean, want)
    found = task.tally(want.expand(3,-1,-1)[mask], frames, mask)
    torch.testing.assert_close(found['loss'], found['mean_frame'])
    right = task.tally(hidden_pixels(frames, mask, norm_pix), frames, mask)
    assert right['loss'].max()==0 and right['mean_frame'].max()>0

def test_the_strip_paints_readable_pixels():
    frames,mask = some()
    right = lambda f,m: hidden_pixels(f, m, True)
    torch.testing.assert_close(strip(right, None, frames, mask, norm_pix=True)['predicted'], frames, atol=1e-5, rtol=0)
    zero = strip(lambda f,m: right(f,m)*0, None, frames, mask, norm_pix=True)['predicted']
    torch.testing.assert_close(to_patches(zero, 8)[mask].mean(1), to_patches(frames, 8)[mask].mean(1), atol=1e-5, rtol=0)

# ---- which patches count
def test_filled_patches_exceed_a_share_of_the_mean():
    frames,mask = some()
    amount = to_patches(frames, 8).unflatten(2, (64,3))[...,::2].sum((2,3))   # both polarities
    for share in (0., .5, 1.): assert torch.equal(filled_patches(frames, mask, share), (amount>share*amount.mean(1, keepdim=True))[mask])

@pytest.mark.parametrize('kind', ['tokens','pixels'])
def test_the_loss_counts_informative_patches_only(monkeypatch, kind):
    "Answers at empty patches change nothing; answers at others do."
    frames,mask = some()
    filled = filled_patches(frames, mask)
    g = torch.Generator().manual_seed(1)
    if kind=='pixels': task,answer = painter_task(monkeypatch, frames, informative=1e-9),torch.randn(24,192, generator=g)
    else:
        vae = SimpleNamespace(to=lambda d: SimpleNamespace(tokens=lambda f: torch.arange(48).view(3,16)%7), num_tokens=8)
        task,answer = TokenTask(None, None, DataConfig(input_H=32, input_W=32), (4,4), 'random', 8, vae=vae, informative=1e-9),torch.randn(24,8, generator=g)
    loss = lambda a: task.judge(a, frames, mask)[0]
    noisy = answer + torch.randn(answer.shape, generator=g)
    assert loss(torch.where(filled[:,None], answer, noisy))==loss(answer)!=loss(torch.where(filled[:,None], noisy, answer))
    empty = torch.zeros_like(frames)
    answer.requires_grad_()
    nothing = task.judge(answer, empty, mask)
    nothing[0].backward()
    assert nothing[0]==0 and (answer.grad==0).all() and all(torch.isfinite(torch.as_tensor(v)).all() for v in nothing[1].values())

def test_parts_add_up_to_the_whole():
    g = torch.Generator().manual_seed(0)
    (frames,mask),tokens,logits = some(),torch.randint(9, (3,16), generator=g),torch.randn(24,9, generator=g)
    filled = filled_patches(frames, mask)
    for f in (masked_loss, masked_accuracy):
        parts = f(logits, tokens, mask, filled)*filled.sum() + f(logits, tokens, mask, ~filled)*(~filled).sum()
        torch.testing.assert_close(parts/24, f(logits, tokens, mask))
    torch.testing.assert_close(masked_loss(logits, tokens, mask), nn.functional.cross_entropy(logits, tokens[mask]))
    assert commonest_share(tokens[mask]) == tokens[mask].bincount().max()/24 and counted_mean(logits[:0])==0

def test_the_last_line_has_the_commonest_beside_the_accuracy():
    m = dict(masked_accuracy=.9, val_masked_accuracy=.421, val_commonest=.2, val_masked_accuracy_filled=.3, val_commonest_filled=.05)
    told = ' '.join(outcome(m))
    for word in ('42.1 %', '20.0 %', '30.0 %', '5.0 %'): assert word in told
    assert 'nan' not in ' '.join(outcome(dict(loss=1., masked_accuracy=.5, commonest=.4, masked_accuracy_filled=.3, commonest_filled=.2)))   # no validation

# ---- settings
def test_betas_reach_the_optimisers_and_belong_to_the_result():
    from mem_nb.finetune import classifier_optimizer
    from mem_nb.encoder import build_encoder
    m = build_encoder((16,16), 8, width=24, depth=1, heads=2, shared_bias=False, num_classes=3)
    assert {g['betas'] for g in pretrain_optimizer(m, 1e-3, .05, .98).param_groups}=={(.9,.98)}
    assert {g['betas'] for g in classifier_optimizer(m, 1e-3, beta2=.95).param_groups}=={(.9,.95)}
    cfg = parse_config(TINY)
    assert (cfg.pretrain.beta2, cfg.finetune.beta2)==(.95, .999)
    for key,section,value in (('pt_beta2','pretrain','.99'), ('class_beta2','finetune','.95'), ('pt_informative','pretrain','0.2')):
        other = parse_config(TINY, [f'{key}={value}'])
        with pytest.raises(ValueError, match=f'{key} was'): check_settings(step_settings(cfg, section), step_settings(other, section), 'here')
        old = {k:v for k,v in step_settings(cfg, section).items() if k!=key}      # a folder begun before the key was there
        check_settings(old, step_settings(cfg, section), 'here')
    for bad,word in (('pt_beta2=1','pt_beta2'), ('class_beta2=-0.1','class_beta2'), ('pt_informative=-1','pt_informative'), ('pt_norm_pix=1','set mae = 1')):
        with pytest.raises(ValueError, match=word): parse_config(TINY, [bad])

# ---- tokens kept from epoch to epoch
FIXED = ['rotate=0', 'scale=0', 'translate=0', 'flip=0', 'time_flip=0', 'max_random_shift_evs=0', 'rand_aug=0', 'slice_max_evs=100000']

def test_kept_tokens_train_to_the_same_weights(digits, tmp_path, monkeypatch):
    from mem_nb.config import parse_config
    from mem_nb.pretrain import pretrain
    from mem_nb.state import save_weights
    from mem_nb.tokenizer import EventVAE, build_tokenizer
    monkeypatch.chdir(tmp_path)
    words = [*FIXED, f'data_path={digits}', 'precision=fp32', 'device=cpu', 'vae_skip=1', 'vae_checkpoint=vae.safetensors']
    cfgs = [parse_config(TINY, [*words, f'expname=cache{c}', f'pt_token_cache={c}']) for c in (0,1)]
    torch.manual_seed(0); save_weights(build_tokenizer(cfgs[0]), 'vae.safetensors')
    named = []
    tokens = EventVAE.tokens
    monkeypatch.setattr(EventVAE, 'tokens', lambda self, frames: (named.append(len(frames)), tokens(self, frames))[1])
    counts = []
    for cfg in cfgs: named.clear(); pretrain(cfg); counts.append(sum(named))
    a,b = ((c.folder/'pretrain/final.safetensors').read_bytes() for c in cfgs)
    assert a==b and counts[1]<counts[0]

@pytest.mark.parametrize('word, named', [('rotate=3','rotate'), ('slice_max_evs=50','slice_max_evs = 50 \\(the longest recording has'),
                                         ('pt_color_jitter=0.3','pt_color_jitter'), ('pt_contrast=1','pt_contrast')])
def test_frames_that_change_are_named(digits, tmp_path, monkeypatch, word, named):
    from mem_nb.datasets import prepared
    from mem_nb.store import EventStore
    from mem_nb.targets import check_fixed
    monkeypatch.chdir(tmp_path)
    cfg = parse_config(TINY, [*FIXED, f'data_path={digits}', 'pt_token_cache=1'])
    store = EventStore(prepared(cfg))
    check_fixed(cfg, store)
    with pytest.raises(ValueError, match=f'these change them: {named}'): check_fixed(parse_config(TINY, [*FIXED, word]), store)

def test_a_folder_that_was_begun_before_a_key_came_goes_on():
    now = step_settings(parse_config(''), 'data', 'tokenizer', 'encoder', 'pretrain', 'finetune', 'segment')
    assert isinstance(now['seg_paste_classes'], list)
    for late in now: check_settings({k:v for k,v in now.items() if k!=late}, now, 'here')
