package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types"
	"github.com/docker/docker/client"
)

const (
	pingTime    = 5 * time.Second
	engineConns = 64 // idle connections kept: the SDK's transport would keep two
)

// engine is a connection to the Docker Engine. The SDK's client is replaced, never changed: its own version
// negotiation races with other calls, ignores their deadlines, and after a failed attempt uses too new a
// version for an old engine.
type engine struct {
	sdk atomic.Pointer[client.Client]
	// negotiated is true if the latest negotiation found a Docker Engine that accepts the version of sdk.
	// negotiate sets it. lost resets it after an error that may mean that the engine was replaced: then the
	// next request negotiates before it asks for anything else.
	negotiated atomic.Bool
}

// newEngine returns the engine at host, which has the form of DOCKER_HOST; if host is empty, DOCKER_HOST
// decides. It does not connect.
func newEngine(host string) (*engine, error) {
	e := &engine{}
	sdk, err := newSDK(cmp.Or(host, os.Getenv(client.EnvOverrideHost), client.DefaultDockerHost))
	e.sdk.Store(sdk)
	return e, err
}

// newSDK returns an SDK client without tracing. The SDK's tracing wraps the body of an upload, and net/http,
// which no longer sees an io.WriterTo, would copy it in small pieces.
func newSDK(host string) (*client.Client, error) {
	var plain *http.Client
	sdk, err := client.NewClientWithOpts(client.FromEnv, client.WithHost(host), func(sdk *client.Client) error {
		plain = sdk.HTTPClient()                       // a copy: tracing is added to the original
		transport := plain.Transport.(*http.Transport) // the only type before WithHTTPClient
		transport.MaxIdleConns, transport.MaxIdleConnsPerHost = engineConns, engineConns
		return nil
	})
	if err == nil {
		err = client.WithHTTPClient(plain)(sdk)
	}
	return sdk, err
}

// api returns the SDK's client, for one call.
func (e *engine) api() *client.Client { return e.sdk.Load() }

// versioned returns the path of a call in the negotiated version of the API. Only the ping has no version.
func (e *engine) versioned(call string) string { return "/v" + e.api().ClientVersion() + call }

// send calls the engine's API without the SDK: for the reads of containers.get; for attaching to stdin, since
// the SDK's attach ignores the deadline while it waits for an engine that hangs; and for a ping, since the
// SDK's Ping changes a request that its transport may still be reading. An answer with another status than
// the given one, redirects included, is an error. The caller closes the body.
func (e *engine) send(ctx context.Context, method string, call url.URL, header http.Header, status int) (
	*http.Response, error) {
	sdk := e.api()
	transport := sdk.HTTPClient().Transport
	at, _ := client.ParseHostURL(sdk.DaemonHost()) // cannot fail: newSDK has parsed it too
	call.Scheme, call.Host, call.Path = "http", at.Host, path.Join(at.Path, call.Path)
	if own, ok := transport.(*http.Transport); ok && own.TLSClientConfig != nil {
		call.Scheme = "https"
	}
	r := &http.Request{Method: method, URL: &call, Host: at.Host, Header: header}
	if at.Scheme == "unix" {
		r.Host = client.DummyHost
	}
	answer, err := transport.RoundTrip(r.WithContext(ctx))
	if err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("%w: %w", errUnreachable, err)
	}
	if err != nil || answer.StatusCode == status {
		return answer, err
	}
	defer answer.Body.Close()
	var body struct{ Message string }
	text, _ := io.ReadAll(io.LimitReader(answer.Body, 64<<10))
	json.Unmarshal(text, &body) // not if an attach is refused: that is plain text
	message := "engine: " + cmp.Or(body.Message, strings.TrimSpace(string(text)), answer.Status)
	switch answer.StatusCode {
	case http.StatusBadRequest:
		return nil, errdefs.ErrInvalidArgument.WithMessage(message)
	case http.StatusNotFound:
		return nil, errdefs.ErrNotFound.WithMessage(message)
	case http.StatusConflict:
		return nil, errdefs.ErrConflict.WithMessage(message)
	}
	return nil, errors.New(message)
}

// ready negotiates unless that was done before.
func (e *engine) ready(ctx context.Context) error {
	if e.negotiated.Load() {
		return nil
	}
	return e.negotiate(ctx)
}

// lost makes the next request negotiate again.
func (e *engine) lost() { e.negotiated.Store(false) }

// negotiate agrees with the engine on the newest version of the API that both have, uses that from now on,
// and checks, in that version, that the engine is a Docker Engine. Another program, or an engine that refuses
// the version that DOCKER_API_VERSION demands, is an error. negotiate takes pingTime at most.
func (e *engine) negotiate(ctx context.Context) (err error) {
	defer func() {
		if errors.Is(err, context.DeadlineExceeded) { // 503 and not 504: nothing was started
			err = newAPIError(kindUnavailable, "the engine does not answer in time")
		} else if err == io.EOF { // an empty answer
			err = errUnreadable
		}
		e.negotiated.Store(err == nil)
	}()
	ctx, cancel := context.WithTimeout(ctx, pingTime)
	defer cancel()
	answer, err := e.send(ctx, http.MethodGet, url.URL{Path: "/_ping"}, http.Header{}, http.StatusOK)
	if err != nil {
		return err
	}
	answer.Body.Close()
	sdk, err := newSDK(e.api().DaemonHost())
	if err != nil {
		return err
	}
	sdk.NegotiateAPIVersionPing(types.Ping{APIVersion: answer.Header.Get("API-Version")})
	if sdk.ClientVersion() != e.api().ClientVersion() {
		e.sdk.Swap(sdk).Close()
	}
	found, err := e.api().ServerVersion(ctx)
	if err != nil {
		return err
	}
	var parts []string
	for _, part := range found.Components {
		parts = append(parts, part.Name)
	}
	if !slices.Contains(parts, "Engine") {
		return newAPIError(kindEngineFailed,
			"the program at the engine's address is not a Docker Engine: its components are %q",
			strings.Join(parts, ", "))
	}
	return nil
}
