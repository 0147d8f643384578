"Two views of a recording: found among strangers, by what is visible alone; what is not asked is not trained."
from dataclasses import replace
import pytest, torch
from conftest import TINY
from mem_nb.config import parse_config
from mem_nb.data import train_batches
from mem_nb.pretrain import MaskedAutoencoder, MaskedEventModel, build_model, pretrain, pretrain_task
from mem_nb.encoder import build_encoder, from_patches, to_patches
from mem_nb.targets import contrast_loss

def seeded(seed=0): return torch.Generator().manual_seed(seed)

def make(root, *overrides):
    return parse_config(TINY, [f'runs_dir={root}', f'data_path={root}/digits', 'num_digits=60', 'mae=1', 'pt_contrast=1', *overrides])

def test_contrast_is_the_mean_surprise_of_naming_the_partner():
    a,b = torch.randn(2, 5, 8, generator=seeded())
    z,want,hits = torch.cat([a,b]),[],0
    for i in range(10):
        near = torch.tensor([float(torch.cosine_similarity(z[i], z[j], dim=0))/.2 if j!=i else -1e9 for j in range(10)])
        want.append(-near.log_softmax(0)[(i+5)%10]); hits += int(near.argmax()==(i+5)%10)
    loss,found = contrast_loss(a, b)
    torch.testing.assert_close(loss, torch.stack(want).mean()); assert float(found)==pytest.approx(hits/10)

def test_partners_pull_and_strangers_push():
    a,b = torch.randn(2, 6, 8, generator=seeded(1)).requires_grad_(True)
    before,_ = contrast_loss(a, b)
    da,db = torch.autograd.grad(before, [a, b])
    after,_ = contrast_loss(a-.5*da, b-.5*db)
    assert after<before and contrast_loss(a, a)[0]<before

@pytest.mark.parametrize('kind', ['tokens','pixels'])
def test_a_vector_does_not_see_hidden_pixels(kind):
    encoder = build_encoder((32,32), 8, 3, 24, 2, 2)
    torch.manual_seed(0)
    model = (MaskedAutoencoder(encoder, 24, 1, 2, True) if kind=='pixels' else MaskedEventModel(encoder, 16, True)).eval()
    frames,mask = torch.rand(4,3,32,32, generator=seeded()),torch.rand(4,16, generator=seeded(2)).argsort(1)<8
    patches = to_patches(frames, 8)
    noise = from_patches(torch.where(mask[...,None], torch.rand(patches.shape, generator=seeded(3)), patches), (32,32))
    seen = from_patches(torch.where(mask[...,None], patches, torch.rand(patches.shape, generator=seeded(3))), (32,32))
    with torch.no_grad(): vectors = [model(f, mask, contrast=True)[1] for f in (frames, noise, seen)]
    torch.testing.assert_close(vectors[0], vectors[1]); assert vectors[0].shape==(4,64) and not torch.allclose(vectors[0], vectors[2])

@pytest.fixture(scope='module')
def root(tmp_path_factory): return tmp_path_factory.mktemp('contrast')

def test_two_views_cost_two_draws_and_add_their_loss(root):
    cfg = make(root, 'pt_contrast=.3', 'pt_dropout=0')
    task = pretrain_task(cfg)
    torch.manual_seed(0)
    model,(batch,) = build_model(cfg),list(train_batches(task.train, None, 8, 0, 2000)(0, 1))
    both,scores = task.loss(model, batch, 0, seeded())
    hidden,_ = replace(task, contrast=1e-9).loss(model, batch, 0, seeded())
    torch.testing.assert_close(both, hidden+.3*scores['contrast']); assert 0<=scores['partner']<=1
    one,two = (task.view(batch, g)[0] for g in [seeded()]*2)
    assert not torch.equal(one, two)

def test_what_is_hidden_can_be_left_out(root):
    cfg = make(root, 'pt_hidden=0', 'expname=two')
    torch.manual_seed(0)
    fresh = build_model(cfg)
    assert all(p.requires_grad==name.startswith(('encoder','project')) for name,p in fresh.named_parameters())
    final = pretrain(cfg)
    assert final['partner']>0 and 'val_loss' not in final and (cfg.folder/'pretrain'/'final.safetensors').is_file()

@pytest.mark.parametrize('wrong', [['pt_hidden=0','pt_contrast=0'], ['pt_hidden=-1'], ['pt_contrast=-.1']])
def test_impossible_weights_are_refused(wrong):
    with pytest.raises(ValueError, match='pt_hidden and pt_contrast are weights'): parse_config(TINY, wrong)
