"The eventVAE computes what the original's DiscreteVAE does, keeps its codes alive (defect 12), and can be found again."
import argparse, math, re
from copy import deepcopy
import numpy as np, pytest, torch, torch.nn.functional as F
from conftest import TINY
from mem_nb.codes import gumbel_noise
from mem_nb.config import parse_config
from mem_nb.settings import TokenizerConfig
from mem_nb.tokenizer import (EventVAE, build_tokenizer, codebook_health, draw_codes, gumbel_weights, kl_to_uniform, load_tokenizer, reconstruct, reconstruction_loss,
                              schedules, temperature_at, tokenizer, tokenizer_file, tokenizer_loss, tokenizer_path, usage_loss)
from mem_nb.train import read_log, save_weights, weights_hash

def seeded(seed=0): return torch.Generator().manual_seed(seed)
def small(seed=0, **kwargs):
    torch.manual_seed(seed)
    return EventVAE(**dict(dict(num_tokens=32, emb_dim=8, hidden_dim=16, num_layers=2, num_resnet_blocks=1), **kwargs))

# ---- the original
@pytest.fixture(scope='module')
def golden(shared):
    data = {k:torch.from_numpy(v) for k,v in np.load(shared/'golden'/'vae.npz').items()}
    vae = EventVAE(3, 64, 8, 16, 2, 1)
    vae.load_state_dict({k[3:]:v for k,v in data.items() if k.startswith('sd/')})   # its own names
    return vae,data

def near(a, b): torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-5)

def test_tokens_and_decoding_agree_with_the_original(golden):
    vae,d = golden
    near(vae.logits(d['x']), d['logits'])
    assert torch.equal(vae.tokens(d['x']), d['indices'])
    near(vae.decode(d['indices']), d['decode'])
    near(reconstruct(vae, d['x']), d['decode'])

@pytest.mark.parametrize('kind', ['mse','smooth_l1','cosine'])
def test_reconstruction_losses_agree_with_the_original(golden, kind):
    vae,d = golden
    near(reconstruction_loss(d['decode'], d['x'], kind), d[f'eval_recon_{kind}'])

@pytest.mark.parametrize('temperature', [1., .5])
@pytest.mark.parametrize('straight_through', [False, True])
def test_training_forward_and_gradients_agree_with_the_original(golden, straight_through, temperature):
    vae,d = golden
    key = f'st{int(straight_through)}_temp{temperature}'
    reconstruction,logits = vae(d['x'], temperature, straight_through, noise=d['gumbel_noise'])
    loss = reconstruction_loss(reconstruction, d['x']) + .01*len(d['x'])*kl_to_uniform(logits)   # the original sums the KL over the batch
    vae.zero_grad(); loss.backward()
    near(loss, d[f'{key}/loss'])
    if f'{key}/recon' in d: near(reconstruction, d[f'{key}/recon'])
    near(vae.codebook.weight.grad, d[f'{key}/grad_codebook'])
    near(vae.encoder[0][0].weight.grad, d[f'{key}/grad_enc0'])

def test_defect_12_kl_is_a_mean_over_the_batch(golden):
    d = golden[1]
    near(3*kl_to_uniform(d['logits']), d['kl_as_written'])
    near(kl_to_uniform(d['logits'].repeat(4,1,1,1)), kl_to_uniform(d['logits']))

def test_a_checkpoint_of_the_original_fits(shared):
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = torch.load(shared/'golden'/'ckpt'/'vae_tiny.pt', weights_only=True)['weights']
    d = {k:torch.from_numpy(v) for k,v in np.load(shared/'golden'/'vae_ckpt.npz').items()}
    vae = EventVAE(3, *weights['codebook.weight'].shape, weights['encoder.0.0.weight'].shape[0], 2, 1)
    vae.load_state_dict(weights)
    assert torch.equal(vae.tokens(d['x']), d['indices'])
    near(vae.decode(d['indices']), d['decode'])

# ---- laws
@pytest.mark.parametrize('chans,size,layers,blocks', [(3,(32,32),2,1), (5,(16,48),3,0), (3,(16,16),4,2)])
def test_shapes(chans, size, layers, blocks):
    grid = tuple(s>>layers for s in size)
    vae,frames = small(in_chans=chans, num_layers=layers, num_resnet_blocks=blocks, grid=grid),torch.rand(2,chans,*size, generator=seeded())
    assert vae.logits(frames).shape == (2,32,*grid)
    assert vae.tokens(frames).shape == (2,grid[0]*grid[1]) and vae.tokens(frames).dtype == torch.int64
    assert vae.decode(vae.tokens(frames)).shape == vae(frames)[0].shape == frames.shape

def test_gumbel_draws_follow_the_probabilities():
    logits = torch.tensor([2.,1.,0.,-1.]).view(1,4,1,1).expand(20_000,4,1,1)
    for straight_through in (False, True):
        weights = gumbel_weights(logits, .05, straight_through, seeded())
        torch.testing.assert_close(weights.sum(1), torch.ones(20_000,1,1))
        torch.testing.assert_close(weights.mean((0,2,3)), logits[0].softmax(0).flatten(), rtol=0, atol=.02)

def test_the_generator_decides():
    vae,frames = small(),torch.rand(2,3,32,32, generator=seeded())
    draw = lambda seed: vae(frames, generator=seeded(seed))[0]
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))

def test_straight_through_uses_one_code_and_still_has_a_gradient():
    vae,frames = small(),torch.rand(2,3,32,32, generator=seeded())
    weights = gumbel_weights(vae.logits(frames), 1., True, seeded())
    torch.testing.assert_close(weights.max(1).values, torch.ones(2,8,8))
    vae(frames, 1., True, seeded())[0].square().mean().backward()
    assert vae.encoder[0][0].weight.grad.abs().sum() > 0

def test_straight_through_passes_the_gradient_of_the_blend():
    logits,w = torch.randn(2,8,3,3, generator=seeded()).requires_grad_(),torch.randn(2,8,3,3, generator=seeded(1))
    grads = [torch.autograd.grad((gumbel_weights(logits, .7, hard, seeded(2))*w).sum(), logits)[0] for hard in (False, True)]
    torch.testing.assert_close(*grads)
    soft,hard = (gumbel_weights(logits, .7, hard, seeded(2)) for hard in (False, True))
    assert torch.equal(soft.argmax(1), hard.argmax(1))          # the code that leads the blend is the one that is taken

# losses: what each asks, in a sentence
def pair(): return torch.rand(3,3,8,8, generator=seeded()),torch.rand(3,3,8,8, generator=seeded(1))

@pytest.mark.parametrize('kind', ['mse','smooth_l1','cosine'])
def test_a_loss_is_zero_for_the_frame_itself_and_above_for_others(kind):
    a,b = pair()
    assert abs(reconstruction_loss(a, a, kind)) < 1e-6 < reconstruction_loss(a, b, kind)
    torch.testing.assert_close(reconstruction_loss(a, b, kind), reconstruction_loss(b, a, kind))
    near(reconstruction_loss(a, b, kind), torch.stack([reconstruction_loss(x[None], y[None], kind) for x,y in zip(a, b)]).mean())   # a mean over frames
    assert reconstruction_loss(a.bfloat16(), b, kind).dtype == torch.float32

def test_mse_is_quadratic_smooth_l1_only_up_to_one():
    a,b = pair()
    loss = lambda kind,far: reconstruction_loss(far*a, torch.zeros_like(a), kind)
    torch.testing.assert_close(loss('mse', 3.), 9*loss('mse', 1.))
    torch.testing.assert_close(reconstruction_loss(a, b, 'smooth_l1'), reconstruction_loss(a, b, 'mse')/2)    # differences below 1
    off = torch.full_like(a, 5.)
    assert math.isclose(reconstruction_loss(off, off*0, 'smooth_l1').item(), 4.5, rel_tol=1e-6)                 # |5| - 1/2

def test_cosine_sees_the_direction_of_a_row_and_not_its_length():
    a,b = pair()
    torch.testing.assert_close(reconstruction_loss(7*a, b, 'cosine'), reconstruction_loss(a, b, 'cosine'))
    torch.testing.assert_close(reconstruction_loss(-a, a, 'cosine'), torch.tensor(2.))
    empty = torch.zeros_like(a)
    assert reconstruction_loss(a, empty, 'cosine') == 1          # an empty row has no direction: no gradient either

@pytest.mark.parametrize('kind', ['mse','smooth_l1','cosine'])
@pytest.mark.parametrize('straight_through', [False, True])
def test_every_loss_falls_with_either_draw(kind, straight_through):
    vae,frames,losses = small(),moving_bars(16),[]
    optimizer = torch.optim.Adam(vae.parameters(), 2e-3)
    for k in range(20):
        loss,m = tokenizer_loss(vae, frames, .9, seeded(k), loss=kind, straight_through=straight_through)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(m['recon'].item())
    assert np.mean(losses[-4:]) < np.mean(losses[:4])

def test_defect_12_temperature_is_a_function_of_the_step():
    t = [temperature_at(k, 100, 1., .3) for k in range(100)]
    assert t[0]==1 and math.isclose(t[-1], .3) and temperature_at(0, 1)==1
    assert np.allclose(np.diff(np.log(t)), np.log(.3)/99)      # every step, by the same factor

def test_defect_12_once_an_epoch_by_the_original_formula():
    "Their loop, step by step: after the first step of an epoch and each 10 000th, by what it was before and the count of steps."
    t = TokenizerConfig(batch_size=8, lr=3e-4, lr_decay=.9, temperature_start=.8, temperature_end=.79996, epochs=4)
    warmth,lr_at = schedules(t, 8*11+5, epoch_schedule=True)       # 11 whole batches: theirs leave the rest out
    temperature,lr,seen = .8,3e-4,0
    for epoch in range(4):
        for i in range(11):
            assert math.isclose(warmth(seen), temperature) and math.isclose(lr_at(seen), lr)
            if i%10_000==0: temperature,lr = max(temperature*math.exp(-1e-6*seen), .79996),lr*.9
            seen += 1
    assert temperature==.79996                            # the floor was reached

@pytest.mark.parametrize('per_epoch,epochs', [(36,300), (25_000,4)])
def test_defect_12_once_an_epoch_agrees_with_the_recorded_values(shared, per_epoch, epochs):
    d = {k.split('/')[1]:v for k,v in np.load(shared/'golden'/'schedules.npz').items() if k.startswith(f'vae_sched_{per_epoch}x{epochs}')}
    warmth,lr_at = schedules(TokenizerConfig(batch_size=1, epochs=epochs), per_epoch, epoch_schedule=True)
    after = [epoch*per_epoch+i+1 for epoch,i in d['epoch_iter'].tolist()]
    assert np.allclose([warmth(k) for k in after], d['temp'], rtol=1e-9) and np.allclose([lr_at(k) for k in after], d['lr'], rtol=1e-9)

def test_schedules_are_per_step_by_default():
    t = TokenizerConfig(batch_size=10, epochs=3, lr=1., lr_decay=.5)
    warmth,lr_at = schedules(t, 100)
    assert [lr_at(k) for k in (0,10,20)] == [1,.5,.25] and lr_at(5) == .5**.5
    assert warmth(0)==1 and math.isclose(warmth(29), .5) and all(a>b for a,b in zip(map(warmth, range(29)), map(warmth, range(1, 30))))

def test_usage_loss_wants_every_code_and_lets_patches_decide():
    decided = 50*F.one_hot(torch.arange(128).view(2,8,8)%32, 32).float().movedim(3,1)
    assert usage_loss(decided) < 1e-4 < kl_to_uniform(decided)
    assert abs(usage_loss(decided[:,:1].new_tensor([50.]+[0]*31).view(1,32,1,1).expand(2,32,8,8))-math.log(32)) < 1e-4
    assert usage_loss(torch.randn(2,32,8,8, generator=seeded())) >= 0

def test_health_counts_codes():
    assert codebook_health(torch.tensor([[3,3],[3,3]]), 8) == dict(codes_used=1, codes_used_fraction=1/8, perplexity=1.)
    even = codebook_health(torch.arange(64), 128)
    assert even['codes_used']==64 and even['codes_used_fraction']==.5 and math.isclose(even['perplexity'], 64)

def moving_bars(n, seed=0):
    "Frames of a bar that moves: brighter in front, darker behind, on nothing."
    rng,frames = np.random.default_rng(seed),torch.zeros(n,3,16,16)
    for f in frames:
        x,y,long = rng.integers(2,13),rng.integers(0,8),rng.integers(4,9)
        f[0,y:y+long,x] = f[2,y:y+long,x-1] = float(rng.uniform(.4,1))
        if rng.random()<.5: f.copy_(f.transpose(1,2).clone())
    return frames

def train(usage_weight, steps=120):
    vae,frames = small(num_tokens=64),moving_bars(256)
    optimizer = torch.optim.Adam(vae.parameters(), 3e-3)
    for k in range(steps):
        batch = frames[torch.randint(256, (32,), generator=seeded(k))]
        loss,_ = tokenizer_loss(vae, batch, temperature_at(k, steps, 1., .3), seeded(k), usage_weight=usage_weight)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    unseen = moving_bars(128, 1)
    return codebook_health(vae.tokens(unseen), 64),reconstruction_loss(reconstruct(vae, unseen), unseen),reconstruction_loss(frames.mean(0).expand_as(unseen), unseen)

def test_defect_12_usage_term_keeps_codes_alive():
    (alone,_,_),(kept,error,blind) = train(0.),train(4e-3)
    assert kept['codes_used'] >= .8*64
    assert kept['perplexity'] > 2*alone['perplexity']
    assert error < .8*blind

# ---- the step
@pytest.fixture(scope='module')
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp('tokenizer')
    cfg = parse_config(TINY, [f'runs_dir={root}', f'data_path={root}/digits'])
    return cfg,tokenizer(cfg)

def test_the_step_learns_and_logs_its_health(run):
    cfg,metrics = run
    log = read_log(cfg.folder/'tokenizer')
    assert log[-1]['recon'] < log[0]['recon'] and log[-1]['lr'] < log[0]['lr']
    assert {'val_recon','val_mean_frame_recon','val_codes_used','val_codes_used_fraction','val_perplexity'} <= metrics.keys()
    assert all({'kl','usage','codes_in_batch','perplexity_in_batch'} <= line.keys() for line in log)
    assert sum('val_perplexity' in line and 'val_codes_used' in line for line in log) >= 9
    assert all(1 <= line['perplexity_in_batch'] <= 32 and 1 <= line['codes_in_batch'] <= 32 for line in log)
    assert all(1 <= line['val_perplexity'] <= line['val_codes_used'] for line in log if 'val_perplexity' in line)
    assert (cfg.folder/'tokenizer'/'media'/'reconstructions.png').exists()

def test_the_tokenizer_is_found_again(run):
    cfg,_ = run
    frames = torch.rand(2,3,32,32, generator=seeded())
    by_config,by_folder = load_tokenizer(cfg),load_tokenizer(cfg.folder/'tokenizer')
    assert torch.equal(by_config.tokens(frames), by_folder.tokens(frames))
    assert not by_config.training and not any(p.requires_grad for p in by_config.parameters())
    skip = deepcopy(cfg)
    skip.run.expname,skip.tokenizer.skip,skip.tokenizer.checkpoint = 'other',True,str(cfg.folder/'tokenizer')
    assert torch.equal(load_tokenizer(skip).tokens(frames), by_folder.tokens(frames))

def stopped(cfg, at):
    "Train until the loss has been asked for step `at`, then fail as a lost machine would; the state before it is saved."
    import mem_nb.tokenizer as module
    real,calls = module.tokenizer_loss,[]
    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls)>at: raise KeyboardInterrupt
        return real(*args, **kwargs)
    module.tokenizer_loss = failing
    try:
        with pytest.raises(KeyboardInterrupt): tokenizer(cfg)
    finally: module.tokenizer_loss = real

def test_defect_12_resume_is_exact_with_the_schedule_of_the_original(run):
    cfg = deepcopy(run[0])
    cfg.data.original,cfg.tokenizer.epochs = ('epoch_schedule',),2
    cfg.run.expname,broken = 'theirs',deepcopy(cfg)
    broken.run.expname = 'theirs-broken'
    tokenizer(cfg); stopped(broken, 8); tokenizer(broken)
    lines = [read_log(c.folder/'tokenizer') for c in (cfg, broken)]
    assert [[l[k] for k in ('step','lr','recon','codes_in_batch')] for l in lines[0]] == [[l[k] for k in ('step','lr','recon','codes_in_batch')] for l in lines[1]]
    a,b = (load_tokenizer(c).state_dict() for c in (cfg, broken))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert len({l['lr'] for l in lines[0]}) <= 3          # two epochs, one change each

def test_weights_are_found_in_a_file_a_step_a_run_and_an_exported_folder(run, tmp_path):
    cfg,_ = run
    final = cfg.folder/'tokenizer'/'final.safetensors'
    (exported := tmp_path/'exported').mkdir()
    (exported/'model.safetensors').write_bytes(final.read_bytes())
    for place in (final, cfg.folder/'tokenizer', cfg.folder, exported):
        assert tokenizer_file(place).read_bytes() == final.read_bytes()
        assert torch.equal(load_tokenizer(place).codebook.weight, load_tokenizer(final).codebook.weight)
        other = deepcopy(cfg)
        other.run.expname,other.tokenizer.skip,other.tokenizer.checkpoint = 'skips',True,str(place)
        assert weights_hash(tokenizer_path(other)) == weights_hash(final) != ''
        assert torch.equal(load_tokenizer(other).codebook.weight, load_tokenizer(final).codebook.weight)

def test_training_starts_from_a_folder_as_from_its_file(run):
    found = []
    for i,place in enumerate((run[0].folder, run[0].folder/'tokenizer'/'final.safetensors')):
        cfg = deepcopy(run[0])
        cfg.run.expname,cfg.tokenizer.checkpoint,cfg.tokenizer.epochs = f'from{i}',str(place),1
        tokenizer(cfg)
        found.append(load_tokenizer(cfg).codebook.weight)
    assert torch.equal(*found)

@pytest.mark.parametrize('where', ['nowhere','empty','empty/w.safetensors'])
def test_a_place_without_weights_is_named(run, tmp_path, where):
    (tmp_path/'empty').mkdir()
    cfg = deepcopy(run[0])
    cfg.run.expname,cfg.tokenizer.checkpoint = 'lost',str(tmp_path/where)
    with pytest.raises(FileNotFoundError, match=where): tokenizer(cfg)
    with pytest.raises(FileNotFoundError, match=where): load_tokenizer(tmp_path/where)
    cfg.tokenizer.skip = True
    with pytest.raises(FileNotFoundError, match=where): load_tokenizer(cfg)

def test_a_pickle_is_sent_to_load_original(tmp_path):
    (tmp_path/'vae.pt').write_bytes(b'no matter')
    with pytest.raises(ValueError, match=r'vae\.pt is a pickle.*load_original'): load_tokenizer(tmp_path/'vae.pt')

@pytest.mark.parametrize('shape', [dict(), dict(num_resnet_blocks=0), dict(num_layers=3, num_resnet_blocks=2, in_chans=5)])
def test_the_shape_is_read_off_the_weights(tmp_path, shape):
    vae = small(**shape)
    save_weights(vae, tmp_path/'w.safetensors')
    again = load_tokenizer(tmp_path/'w.safetensors')
    assert {k:v.shape for k,v in again.state_dict().items()} == {k:v.shape for k,v in vae.state_dict().items()}

def test_after_a_loss_that_is_no_number_the_way_on_can_be_gone(tmp_path, monkeypatch):
    words,calls = [f'data_path={tmp_path}/digits', f'runs_dir={tmp_path}', 'vae_epochs=2', 'save_minutes=1e-6'],[]
    def bad(*args, **kwargs):
        calls.append(1)
        loss,metrics = tokenizer_loss(*args, **kwargs)
        return loss*(float('nan') if len(calls)>8 else 1), metrics
    with monkeypatch.context() as m, pytest.raises(FloatingPointError, match='vae_checkpoint can begin from it') as e:
        m.setattr('mem_nb.tokenizer.tokenizer_loss', bad)
        tokenizer(parse_config(TINY, [*words, 'expname=first']))
    kept = re.search(r'kept in (\S+state.pt)', str(e.value))[1]
    assert load_tokenizer(kept).num_tokens==32
    assert np.isfinite(tokenizer(parse_config(TINY, [*words, 'expname=second', f'vae_checkpoint={kept}']))['loss'])

def test_what_does_not_fit_is_said(run):
    with pytest.raises(ValueError, match='no weights of a tokenizer; missing: codebook.weight'):
        save_weights(torch.nn.Linear(2,2), file := run[0].folder/'other.safetensors'); load_tokenizer(file)
    cfg = deepcopy(run[0])
    cfg.tokenizer.num_tokens = 16
    with pytest.raises(ValueError, match=r'codebook.weight \(32, 32\), the model has \(16, 32\)'): load_tokenizer(cfg)
    cfg.run.expname = 'nowhere'
    with pytest.raises(FileNotFoundError, match='mem_nb tokenizer'): load_tokenizer(cfg)
    cfg.tokenizer.skip = True
    with pytest.raises(ValueError, match='vae_checkpoint'): load_tokenizer(cfg)
    with pytest.raises(ValueError, match='patches of 4'): build_tokenizer(run[0]).tokens(torch.zeros(1,3,30,30))
    with pytest.raises(ValueError, match='no square grid'): small().decode(torch.zeros(1,40).long())
    with pytest.raises(ValueError, match='known: mse'): reconstruction_loss(torch.zeros(1), torch.zeros(1), 'huber')

# ---- memory
@pytest.mark.parametrize('straight_through', [False, True])
def test_a_few_places_at_a_time_is_the_same_as_all_at_once(straight_through):
    vae,frames,few = small(),torch.rand(3,3,32,32, generator=seeded()),7
    seeds = torch.randint(2**62, (3,16), generator=seeded(5)).flatten().tolist()     # four places a seed: the most that divide 64, up to 7
    noise = torch.cat([gumbel_noise((4,32), seeded(s)) for s in seeds]).view(3,8,8,32).permute(0,3,1,2)
    def whole():
        reconstruction,logits = vae(frames, .7, straight_through, noise=noise)
        return reconstruction,kl_to_uniform(logits),usage_loss(logits),logits.argmax(1).flatten(1)
    def pieces():
        blends,t = draw_codes(vae.features(frames), vae.encoder[-1], vae.codebook.weight, .7, straight_through, seeded(5), few)
        return vae.decoder(blends),t['kl'],t['usage'],t['codes']
    found = []
    for (reconstruction,kl,usage,codes) in (whole(), pieces()):
        vae.zero_grad()
        ((reconstruction-frames).square().sum() + .1*kl + usage).backward()
        found.append([reconstruction, kl, usage, *(p.grad.clone() for p in vae.parameters())])
        assert torch.equal(codes, vae.tokens(frames))
    for a,b in zip(*found): near(a, b)

def test_nothing_as_large_as_the_logits_waits_for_the_gradient():
    vae,frames,kept = small(num_tokens=512),torch.rand(2,3,32,32, generator=seeded()),[]
    x = vae.features(frames)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        draw_codes(x, vae.encoder[-1], vae.codebook.weight, 1., False, seeded(), 16)
    assert max(kept, default=0) < 2*64*512
