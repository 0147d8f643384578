"Codes are counted and drawn whatever their number; the yardsticks spend no more bits than they say and see no held-out frame."
import matplotlib.pyplot as plt, numpy as np, pytest, torch, torch.nn.functional as F
from mem_nb.codebook import (best_step, code_counts, code_pictures, codebook_figure, frame_bits, kmeans_frames, pca_frames, rebuilt_frames,
                             reconstruction_table, round_to, show_code_shares, split_bits)
from mem_nb.tokenizer import EventVAE, reconstruct

def seeded(seed=0): return torch.Generator().manual_seed(seed)
def small(seed=0, **kwargs):
    torch.manual_seed(seed)
    return EventVAE(**dict(dict(num_tokens=32, emb_dim=8, hidden_dim=8, num_layers=2, num_resnet_blocks=1), **kwargs)).eval().requires_grad_(False)
def noise(n, seed=0, size=16): return torch.rand(n,3,size,size, generator=seeded(seed))
def error(a, b): return F.mse_loss(a, b).item()

# ---- codes
def test_every_token_is_counted_once():
    vae,frames = small(),noise(10)
    counts = code_counts(vae, frames, batch_size=3)
    assert counts.shape==(32,) and counts.sum()==10*16
    assert torch.equal(counts, torch.bincount(vae.tokens(frames).flatten(), minlength=32))

@pytest.mark.parametrize('shape', [dict(), dict(in_chans=5, num_layers=3, num_resnet_blocks=0)])
def test_pictures_do_not_depend_on_the_batch(shape):
    vae = small(**shape)
    every = code_pictures(vae)
    assert every.shape == (32, vae.decoder[-1].out_channels, *(2**vae.num_layers,)*2)
    torch.testing.assert_close(code_pictures(vae, batch_size=5), every)
    torch.testing.assert_close(code_pictures(vae, [7,31,0]), every[[7,31,0]])

def titles(fig): return [ax.get_title() for ax in fig.axes if ax.get_title()]

def test_pages_show_every_code_once_in_falling_order():
    vae,frames = small(),noise(40)
    counts = code_counts(vae, frames)
    pages = [titles(codebook_figure(vae, frames, most=12, first=k)) for k in (0,12,24)]
    plt.close('all')
    assert [len(p) for p in pages] == [12,12,8]
    said = [0. if t=='unused' else float(t.split()[0]) for p in pages for t in p]
    assert said == sorted(said, reverse=True) and abs(sum(said)-100) < 1
    assert sum(s==0 for s in said) == (counts==0).sum()
    with pytest.raises(ValueError, match='rank 0…31'): codebook_figure(vae, frames, first=32)

def test_a_page_of_8192_codes_decodes_no_other(monkeypatch):
    vae,frames,asked = small(num_tokens=8192),noise(4),[]
    decode = vae.decode
    monkeypatch.setattr(vae, 'decode', lambda tokens,grid=None: asked.append(len(tokens)) or decode(tokens, grid))
    assert len(titles(codebook_figure(vae, frames, most=40, first=100))) == 40
    plt.close('all')
    assert sum(asked)==40 and max(asked)<=32

def test_shares_are_a_falling_line_of_the_used_codes():
    ax = show_code_shares({'a':torch.tensor([0,5,1,4]), 'b':torch.tensor([1,1,1,1])})
    a,b = (line.get_ydata() for line in ax.lines[:2])
    plt.close('all')
    assert np.allclose(a, [50,40,10]) and np.allclose(b, 25)

# ---- yardsticks
def test_all_bits_are_given_and_the_larger_gets_no_fewer():
    variance = torch.rand(20, generator=seeded()).sort(descending=True).values
    for bits in (0,1,17,200):
        given = split_bits(variance, bits)
        assert given.sum()==bits and (given.diff()<=0).all()
    left = variance/4.**split_bits(variance, 200)
    assert left.max() <= 4.001*left.min()            # nobody could be helped more than anybody else

def test_rounding_knows_that_many_values_and_more_bits_are_nearer():
    x,errors = torch.randn(500, 2, generator=seeded())*torch.tensor([3.,.1]),[]
    for b in (1,2,4,8):
        bits = torch.full((2,), b)
        rounded = round_to(x, best_step(x, bits), bits)
        assert all(len(c.unique())<=2**b for c in rounded.T)
        errors.append(error(rounded, x))
    assert all(a>b for a,b in zip(errors, errors[1:]))

def test_no_bits_are_the_mean_frame_and_more_are_better():
    train,frames = noise(60),noise(20, 1)
    low = lambda f: (f.flatten(1)[:,:5]@noise(5, 2).flatten(1)).view_as(f)      # frames of five numbers
    train,frames = low(train),low(frames)
    torch.testing.assert_close(pca_frames(train, frames, 0), train.mean(0).expand_as(frames))
    errors = [error(pca_frames(train, frames, b), frames) for b in (0,5,15,40,60)]
    assert all(a>b for a,b in zip(errors, errors[1:])) and errors[-1] < .01*errors[0]

def test_pca_keeps_to_its_bits():
    train,frames = noise(40),noise(3000, 1)
    for bits in (1,3):
        assert len(pca_frames(train, frames, bits).flatten(1).unique(dim=0)) <= 2**bits       # so many frames can be told apart

def test_kmeans_has_so_many_patches_and_is_exact_where_these_suffice():
    patches = noise(4, size=4)
    frame = lambda seed: patches[torch.randint(4, (16,), generator=seeded(seed))].view(4,4,3,4,4).permute(2,0,3,1,4).reshape(3,16,16)
    train,frames = (torch.stack([frame(s) for s in seeds]) for seeds in (range(20), range(20, 30)))
    torch.testing.assert_close(kmeans_frames(train, frames, 4, 4), frames)
    torch.testing.assert_close(kmeans_frames(train, frames, 9, 4), frames)         # fewer patches than codes
    got = kmeans_frames(noise(20), noise(10, 1), 5, 4)
    assert len(got.unfold(2,4,4).unfold(3,4,4).permute(0,2,3,1,4,5).reshape(-1, 48).unique(dim=0)) <= 5

def test_yardsticks_learn_from_training_frames_only():
    vae,train,frames = small(),noise(30),noise(12, 1)
    together,alone = rebuilt_frames(vae, train, frames),[rebuilt_frames(vae, train, f[None]) for f in frames]
    assert list(together) == ['tokenizer','mean frame','PCA','patch k-means']
    for name,f in together.items(): torch.testing.assert_close(f, torch.cat([a[name] for a in alone]), rtol=1e-4, atol=1e-5)

def test_the_table_tells_error_and_bits():
    vae,train,frames = small(),noise(30),noise(12, 1)
    table = reconstruction_table(vae, train, frames)
    assert {k:v['bits'] for k,v in table.items()} == {'tokenizer':80, 'mean frame':0, 'PCA':80, 'patch k-means':80}
    assert np.isclose(table['tokenizer']['mse'], error(reconstruct(vae, frames), frames))
    assert np.isclose(table['mean frame']['mse'], error(train.mean(0).expand_as(frames), frames))
    assert list(reconstruction_table(vae, train, frames, ['PCA'])) == ['tokenizer','PCA']
    assert frame_bits(small(num_tokens=8), noise(1)) == 48

def test_equal_frames_need_no_bits():
    train = noise(1).expand(10,-1,-1,-1)
    for name,f in rebuilt_frames(small(), train, train[:2], ['mean frame','PCA','patch k-means']).items():
        if name!='tokenizer': torch.testing.assert_close(f, train[:2])
