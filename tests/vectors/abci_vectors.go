// Writes abci.json: the bytes that CometBFT's own library makes of the messages in test_abci_messages.py.
// Run it where CometBFT's module can be had:
//
//	mkdir /tmp/abci && cp abci_vectors.go /tmp/abci/main.go && cd /tmp/abci && go mod init abci &&
//	go get github.com/cometbft/cometbft@v0.38.25 && go run . > abci.json
package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"time"

	abci "github.com/cometbft/cometbft/abci/types"
	crypto "github.com/cometbft/cometbft/proto/tendermint/crypto"
	types "github.com/cometbft/cometbft/proto/tendermint/types"
)

func fill(value byte, count int) []byte { return bytes.Repeat([]byte{value}, count) }

func key(value byte) crypto.PublicKey {
	return crypto.PublicKey{Sum: &crypto.PublicKey_Ed25519{Ed25519: fill(value, 32)}}
}

func main() {
	now := time.Unix(1700000000, 5).UTC()
	commit := abci.CommitInfo{Round: 1, Votes: []abci.VoteInfo{{Validator: abci.Validator{Address: fill(1, 20), Power: 1}, BlockIdFlag: types.BlockIDFlagCommit}}}
	evidence := []abci.Misbehavior{{Type: abci.MisbehaviorType_DUPLICATE_VOTE, Validator: abci.Validator{Address: fill(2, 20), Power: 1}, Height: 3, Time: now, TotalVotingPower: 4}}
	snapshot := abci.Snapshot{Height: 1000, Format: 1, Chunks: 3, Hash: fill(9, 32), Metadata: []byte("manifest")}
	requests := map[string]*abci.Request{
		"echo":                  abci.ToRequestEcho("hallo"),
		"flush":                 abci.ToRequestFlush(),
		"info":                  abci.ToRequestInfo(&abci.RequestInfo{Version: "0.38.25", BlockVersion: 11, P2PVersion: 8, AbciVersion: "2.0.0"}),
		"init_chain":            abci.ToRequestInitChain(&abci.RequestInitChain{Time: now, ChainId: "chain", ConsensusParams: &types.ConsensusParams{Block: &types.BlockParams{MaxBytes: 7, MaxGas: -1}}, Validators: []abci.ValidatorUpdate{{PubKey: key(1), Power: 1}, {PubKey: key(2), Power: 10}}, AppStateBytes: []byte("{}"), InitialHeight: 1}),
		"init_chain_other_key":  abci.ToRequestInitChain(&abci.RequestInitChain{Time: now, Validators: []abci.ValidatorUpdate{{PubKey: crypto.PublicKey{Sum: &crypto.PublicKey_Secp256K1{Secp256K1: fill(3, 33)}}, Power: 1}}}),
		"query":                 abci.ToRequestQuery(&abci.RequestQuery{Data: []byte{1, 2}, Path: "/head", Height: 5, Prove: true}),
		"check_tx":              abci.ToRequestCheckTx(&abci.RequestCheckTx{Tx: []byte("tx")}),
		"recheck_tx":            abci.ToRequestCheckTx(&abci.RequestCheckTx{Tx: []byte("tx"), Type: abci.CheckTxType_Recheck}),
		"commit":                abci.ToRequestCommit(),
		"list_snapshots":        abci.ToRequestListSnapshots(&abci.RequestListSnapshots{}),
		"offer_snapshot":        abci.ToRequestOfferSnapshot(&abci.RequestOfferSnapshot{Snapshot: &snapshot, AppHash: fill(8, 32)}),
		"load_snapshot_chunk":   abci.ToRequestLoadSnapshotChunk(&abci.RequestLoadSnapshotChunk{Height: 1000, Format: 1, Chunk: 2}),
		"apply_snapshot_chunk":  abci.ToRequestApplySnapshotChunk(&abci.RequestApplySnapshotChunk{Index: 2, Chunk: []byte("chunk"), Sender: "peer"}),
		"prepare_proposal":      abci.ToRequestPrepareProposal(&abci.RequestPrepareProposal{MaxTxBytes: 100, Txs: [][]byte{[]byte("a"), {}, []byte("b")}, Misbehavior: evidence, Height: 9, Time: now, NextValidatorsHash: fill(4, 32), ProposerAddress: fill(5, 20)}),
		"process_proposal":      abci.ToRequestProcessProposal(&abci.RequestProcessProposal{Txs: [][]byte{[]byte("a")}, ProposedLastCommit: commit, Misbehavior: evidence, Hash: fill(6, 32), Height: 9, Time: now, NextValidatorsHash: fill(4, 32), ProposerAddress: fill(5, 20)}),
		"extend_vote":           abci.ToRequestExtendVote(&abci.RequestExtendVote{Hash: fill(6, 32), Height: 9, Time: now, ProposedLastCommit: commit}),
		"verify_vote_extension": abci.ToRequestVerifyVoteExtension(&abci.RequestVerifyVoteExtension{Hash: fill(6, 32), ValidatorAddress: fill(5, 20), Height: 9, VoteExtension: []byte("x")}),
		"finalize_block":        abci.ToRequestFinalizeBlock(&abci.RequestFinalizeBlock{Txs: [][]byte{[]byte("a"), []byte("b")}, DecidedLastCommit: commit, Misbehavior: evidence, Hash: fill(6, 32), Height: 1 << 40, Time: now, NextValidatorsHash: fill(4, 32), ProposerAddress: fill(5, 20)}),
	}
	responses := map[string]*abci.Response{
		"exception":             abci.ToResponseException("wrong"),
		"echo":                  abci.ToResponseEcho("hallo"),
		"flush":                 abci.ToResponseFlush(),
		"info":                  abci.ToResponseInfo(&abci.ResponseInfo{Data: "ledger", Version: "1", AppVersion: 1, LastBlockHeight: 300, LastBlockAppHash: fill(7, 32)}),
		"init_chain":            abci.ToResponseInitChain(&abci.ResponseInitChain{ConsensusParams: &types.ConsensusParams{Block: &types.BlockParams{MaxBytes: 2097152, MaxGas: -1}, Version: &types.VersionParams{App: 1}}, Validators: []abci.ValidatorUpdate{{PubKey: key(1), Power: 1}}, AppHash: fill(7, 32)}),
		"query":                 abci.ToResponseQuery(&abci.ResponseQuery{Code: 1, Log: "no", Key: []byte("k"), Value: []byte("v"), Height: 12}),
		"check_tx":              abci.ToResponseCheckTx(&abci.ResponseCheckTx{Code: 2, Data: []byte("d"), Log: "why"}),
		"commit":                abci.ToResponseCommit(&abci.ResponseCommit{RetainHeight: 4}),
		"list_snapshots":        abci.ToResponseListSnapshots(&abci.ResponseListSnapshots{Snapshots: []*abci.Snapshot{&snapshot, &snapshot}}),
		"offer_snapshot":        abci.ToResponseOfferSnapshot(&abci.ResponseOfferSnapshot{Result: abci.ResponseOfferSnapshot_REJECT}),
		"load_snapshot_chunk":   abci.ToResponseLoadSnapshotChunk(&abci.ResponseLoadSnapshotChunk{Chunk: []byte("chunk")}),
		"apply_snapshot_chunk":  abci.ToResponseApplySnapshotChunk(&abci.ResponseApplySnapshotChunk{Result: abci.ResponseApplySnapshotChunk_RETRY, RefetchChunks: []uint32{1, 300}, RejectSenders: []string{"peer"}}),
		"prepare_proposal":      abci.ToResponsePrepareProposal(&abci.ResponsePrepareProposal{Txs: [][]byte{[]byte("a"), {}}}),
		"process_proposal":      abci.ToResponseProcessProposal(&abci.ResponseProcessProposal{Status: abci.ResponseProcessProposal_REJECT}),
		"extend_vote":           abci.ToResponseExtendVote(&abci.ResponseExtendVote{VoteExtension: []byte("x")}),
		"verify_vote_extension": abci.ToResponseVerifyVoteExtension(&abci.ResponseVerifyVoteExtension{Status: abci.ResponseVerifyVoteExtension_ACCEPT}),
		"finalize_block":        abci.ToResponseFinalizeBlock(&abci.ResponseFinalizeBlock{TxResults: []*abci.ExecTxResult{{}, {Code: 1, Data: []byte("d"), Log: "why"}}, ValidatorUpdates: []abci.ValidatorUpdate{{PubKey: key(1), Power: 0}, {PubKey: key(2), Power: -1}}, AppHash: fill(7, 32)}),
	}
	written := map[string]map[string]string{"requests": {}, "responses": {}}
	for name, message := range requests {
		raw, err := message.Marshal()
		if err != nil {
			panic(err)
		}
		written["requests"][name] = hex.EncodeToString(raw)
	}
	for name, message := range responses {
		raw, err := message.Marshal()
		if err != nil {
			panic(err)
		}
		written["responses"][name] = hex.EncodeToString(raw)
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetIndent("", " ")
	if err := encoder.Encode(written); err != nil {
		panic(err)
	}
}
