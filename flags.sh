r(){ echo "\$ penstock serve $*"; timeout 60 nice penstock serve "$@" 2>&1 | tail -3; echo "rc ${PIPESTATUS[0]}"; }
S="--model scripted:/tmp/serve_w/slow.yaml"
r --port 99999 $S
r --port abc $S
r --host 0.0.0.0 $S
r --host nosuch.host.invalid $S
r --port 18001 $S
r --model /nope
r --model scripted:/nope
r $S --ssl-certfile /nope --ssl-keyfile /nope
r $S --ssl-certfile /tmp/serve_w/tls/cert.pem
r $S --ssl-certfile /tmp/serve_w/tls/key.pem --ssl-keyfile /tmp/serve_w/tls/cert.pem
r $S --max-batch-size 0
r $S --max-batch-size x
r $S --max-bach-size 4
r $S --api-key ""
r $S --api-key a --api-key a
r $S --admin-key ""
r $S --adapter foo
r $S --adapter foo=/nope
r $S --drain-timeout-s -1
r $S --served-model-name ""
r $S --served-model-name a a
r $S --replicas 0
r $S --routing load
r $S --device cuda
r $S --config /nope.yaml
r $S --tool-format foo
r $S extra
r --model /tmp/models/smol --dtype float99
r --model /tmp/models/smol --quantization int3
r $S --cors-origins notaurl
