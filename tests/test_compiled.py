"The compiled loops do what their plain functions say, and what NumPy says."
import numpy as np, pytest
from mem_nb.cameras import compiled, decode_evt2, decode_evt3, empty_columns, evt3_columns
from mem_nb.events import EVENT_DTYPE, EventFileError, make_events
from mem_nb.formats import event_chunks, fill_bin, fill_dat, read_events, write_events

@pytest.mark.parametrize('seed', range(5))
def test_decoders_do_what_their_plain_functions_do(seed):
    rng = np.random.default_rng(seed)
    known = rng.choice([0,2,3,4,5,6,7,8,10,14,15], 200).astype(np.uint16)<<12 | rng.integers(0, 2**12, 200, dtype=np.uint16)
    with_fault = np.append(known, np.uint16(0x9000))
    heads = rng.choice([0,1,8,10], 60).astype(np.uint32)<<28 | rng.integers(0, 2**28, 60, dtype=np.uint32)
    pairs = np.stack([rng.integers(0, 2**32, 60, dtype=np.uint32), heads], 1)
    for decode,words,n,state in [(decode_evt3, known, 12*200, ([-1]*4,)), (decode_evt3, with_fault, 12*201, ([-1]*4,)),
                                 (decode_evt2, heads[:,None], 60, (0,[-1])), (decode_evt2, pairs, 32*60, (1,[-1])), (decode_evt2, pairs[:,::-1].copy(), 32*60, (0,[-1]))]:
        got = []
        for f in (decode, decode.plain):
            columns,extra = empty_columns(n),[np.array(s) if isinstance(s, list) else s for s in state]
            for c in columns: c[:] = 0
            with np.errstate(over='ignore'): told = f(words, *extra, *columns)
            got.append((told, extra, columns))
        (told,extra,columns),(told_plain,extra_plain,columns_plain) = got
        assert told==told_plain and all((np.array(a)==np.array(b)).all() for a,b in zip(extra+list(columns), extra_plain+list(columns_plain)))

@pytest.mark.parametrize('fill,each', [(fill_bin,5), (fill_dat,8)])
def test_quick_readers_do_what_their_plain_functions_do(fill, each):
    raw = np.random.default_rng(0).integers(0, 256, each*50, dtype=np.uint8)
    a,b = np.zeros(50, EVENT_DTYPE),np.rec.array(np.zeros(50, EVENT_DTYPE))
    assert fill(raw, a, 0)==fill.plain(raw, b, 0)==False and (a==b).all() and (np.diff(a['t'])<0).any()

@pytest.mark.parametrize('suffix,each', [('.bin',5), ('.dat',8)])
def test_a_long_file_is_read_quickly_as_in_pieces(suffix, each, tmp_path):
    rng,path = np.random.default_rng(0),tmp_path/f'a{suffix}'
    n = 2**22//each + 77
    e = make_events(rng.integers(0, 240, n), rng.integers(0, 180, n), np.sort(rng.integers(0, 2**23, n)), rng.integers(0, 2, n))
    write_events(path, e)
    whole = read_events(path, size=(180,240))
    with pytest.raises(EventFileError, match='y = 179 at event'): read_events(path, size=(179,240))
    assert (whole==e).all() and (np.concatenate(list(event_chunks(path)))==e).all()
    raw = path.read_bytes()
    path.write_bytes(raw[:-2*each] + raw[-each:] + raw[-2*each:-each])                # the last two change places
    if e['t'][-1]>e['t'][-2]:
        with pytest.raises(EventFileError, match=f'backwards at event {n-1}'): read_events(path)
    path.write_bytes(raw[:-1])
    with pytest.raises(EventFileError, match='truncated'): read_events(path)

def test_vectors_that_lead_too_far_are_refused(tmp_path):
    words = np.array([0x8001,0x0005,0x3000] + [0x4001]*2800, '<u2')
    (tmp_path/'a.raw').write_bytes(b'% evt 3.0\n' + words.tobytes())
    with pytest.raises(EventFileError, match='past column 32767 at byte'): list(evt3_columns(tmp_path/'a.raw', 100))

def test_a_loop_is_compiled_where_nothing_can_be_kept(monkeypatch):
    import numba
    real = numba.njit
    def njit(cache=False, **how):
        if cache: raise RuntimeError('cannot cache function')
        return real(**how)
    monkeypatch.setattr(numba, 'njit', njit)
    assert compiled(lambda a: a.sum()+1)(np.arange(4))==7
