"""A training that counts, and obeys the contract of the real one: on USR1 or TERM it stops after the present step, saves,
and ends with 75; finished it ends with 0. Called as the batch script calls Python: … standin.py -c ENTRY STEP CONF."""
import hashlib, json, os, signal, sys, time
from pathlib import Path

step,conf = sys.argv[-2:]
folder = Path(conf).parents[1]/'pretrain'
rank,world = int(os.environ.get('RANK', 0)),int(os.environ.get('WORLD_SIZE', 1))
plan = json.loads((folder.parent/'plan.json').read_text()) if (folder.parent/'plan.json').exists() else {}
steps,seconds = plan.get('steps', 40),plan.get('seconds', .1)
(folder/'last').mkdir(parents=True, exist_ok=True)
asked = []
for s in (signal.SIGUSR1, signal.SIGTERM): signal.signal(s, lambda number,_: asked.append(number))

state = folder/'last'/f'rank{rank}.json'
at,value = json.loads(state.read_text()) if state.exists() else (0, f'seed {rank}')
said = [folder/'last'/f'said{r}' for r in range(world)]   # a line a step: was this rank asked to stop? In place of an all-reduce
said[rank].write_text('')
begun = at
if world>1:   # a rendezvous, so that none starts before all are there
    import socket
    address = (os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))
    if rank==0:
        with socket.create_server(address) as server:
            server.settimeout(30)
            there = [server.accept()[0] for _ in range(world-1)]
            for c in there: c.sendall(b'go'); c.close()
    else:
        for _ in range(300):
            try: c = socket.create_connection(address, 1); break
            except OSError: time.sleep(.1)
        assert c.recv(2)==b'go'

def save(): tmp = state.with_suffix('.tmp'); tmp.write_text(json.dumps([at, value])); tmp.replace(state)
while at<steps:
    time.sleep(seconds)
    at,value = at+1,hashlib.sha256(value.encode()).hexdigest()
    if rank==0:
        with open(folder/'log.jsonl', 'a') as f: f.write(json.dumps(dict(step=at, steps=steps, loss=1/at, images_s=64/seconds, step_seconds=seconds, time=time.time()))+'\n')
    if at==plan.get('fail_at') and rank==world-1: sys.exit(f'mem_nb {step}: loss nan at step {at}')
    if at%10==0: save()
    with open(said[rank], 'a') as f: f.write(f'{len(asked)>0:d}\n')
    lines = [[] for _ in said]
    while any(len(l)<at-begun for l in lines):
        lines = [f.read_text().splitlines() for f in said]
        if world>1: time.sleep(.005)
    if any(l[at-begun-1]=='1' for l in lines):   # all at the same step
        save()
        print(f'asked to stop at step {at}; the same command continues', flush=True)
        time.sleep(.3*rank)   # ranks do not end together
        sys.exit(75)
(folder/f'final{rank}.txt').write_text(value)
if rank==0:
    (folder/'final.json').write_text('{"metrics": {}}')
    (folder/'final.safetensors').write_text(value)
