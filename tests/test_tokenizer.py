"The eventVAE computes what the original's DiscreteVAE does, keeps its codes alive (defect 12), and can be found again."
import argparse, math
from copy import deepcopy
import numpy as np, pytest, torch, torch.nn.functional as F
from conftest import TINY
from mem_nb.config import parse_config
from mem_nb.tokenizer import (EventVAE, build_tokenizer, code_pictures, codebook_health, gumbel_weights, kl_to_uniform, load_tokenizer,
                              reconstruct, reconstruction_loss, temperature_at, tokenizer, tokenizer_loss, usage_loss)
from mem_nb.train import read_log, save_weights

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
    assert code_pictures(vae).shape == (32,chans,2**layers,2**layers)

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

def test_defect_12_temperature_is_a_function_of_the_step():
    t = [temperature_at(k, 100, 1., .3) for k in range(100)]
    assert t[0]==1 and math.isclose(t[-1], .3) and temperature_at(0, 1)==1
    assert np.allclose(np.diff(np.log(t)), np.log(.3)/99)      # every step, by the same factor

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
    assert {'kl','usage','codes_in_batch'} <= log[-1].keys()
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

@pytest.mark.parametrize('shape', [dict(), dict(num_resnet_blocks=0), dict(num_layers=3, num_resnet_blocks=2, in_chans=5)])
def test_the_shape_is_read_off_the_weights(tmp_path, shape):
    vae = small(**shape)
    save_weights(vae, tmp_path/'w.safetensors')
    again = load_tokenizer(tmp_path/'w.safetensors')
    assert {k:v.shape for k,v in again.state_dict().items()} == {k:v.shape for k,v in vae.state_dict().items()}

def test_what_does_not_fit_is_said(run):
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
