package main

import (
	"context"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/docker/docker/client"
)

const (
	pingTime    = 5 * time.Second
	engineConns = 64 // idle connections kept: the SDK's transport would keep two
)

// engine is the way to the Docker Engine. The SDK's client is replaced, never changed:
// its own version negotiation is not safe beside other calls, ignores their deadlines,
// and speaks to an old engine in too new a version after an attempt that failed.
type engine struct {
	host  string
	sdk   atomic.Pointer[client.Client]
	known atomic.Bool // sdk speaks the version of the engine that answered last
}

// newEngine returns the engine at host, as DOCKER_HOST gives it; if that is empty, at the
// environment's. It does not connect.
func newEngine(host string) (*engine, error) {
	e := &engine{host: host}
	sdk, err := e.newSDK()
	if err != nil {
		return nil, err
	}
	e.sdk.Store(sdk)
	return e, nil
}

// newSDK returns the SDK's client, on its own transport and without its tracing: that
// would hide from net/http that a body writes itself.
func (e *engine) newSDK() (*client.Client, error) {
	var plain *http.Client
	var transport http.RoundTripper
	options := []client.Opt{client.WithHost(client.DefaultDockerHost), client.FromEnv}
	if e.host != "" {
		options = append(options, client.WithHost(e.host))
	}
	sdk, err := client.NewClientWithOpts(append(options, func(sdk *client.Client) error {
		plain = sdk.HTTPClient()
		transport = plain.Transport
		if t, ok := transport.(*http.Transport); ok {
			t.MaxIdleConns, t.MaxIdleConnsPerHost = engineConns, engineConns
		}
		return client.WithHTTPClient(plain)(sdk)
	})...)
	if err == nil {
		plain.Transport = transport
	}
	return sdk, err
}

// api returns the SDK's client, for one call.
func (e *engine) api() *client.Client { return e.sdk.Load() }

// inspect returns the engine's bytes about a container. From a local engine it gets them
// itself: to decode all of them, as the SDK does, costs more than the rest of a read.
func (e *engine) inspect(ctx context.Context, nameOrID string) ([]byte, error) {
	sdk := e.api()
	if strings.HasPrefix(sdk.DaemonHost(), "unix://") {
		url := "http://" + client.DummyHost + "/v" + sdk.ClientVersion() + "/containers/" + nameOrID + "/json"
		if r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil); err == nil {
			if answer, err := sdk.HTTPClient().Do(r); err == nil {
				defer answer.Body.Close()
				if answer.StatusCode == http.StatusOK {
					return io.ReadAll(answer.Body)
				}
			}
		}
	}
	_, raw, err := sdk.ContainerInspectWithRaw(ctx, nameOrID, false) // for its errors, too
	return raw, err
}

// connect makes sure that the engine's version is known. It costs nothing while it is.
func (e *engine) connect(ctx context.Context) error {
	if e.known.Load() {
		return nil
	}
	return e.ping(ctx)
}

// lost notes that the engine was out of reach: another version may come back.
func (e *engine) lost() { e.known.Store(false) }

// ping asks the engine for its version, within pingTime, and speaks that from now on.
func (e *engine) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, pingTime)
	defer cancel()
	answer, err := e.api().Ping(ctx)
	if err != nil {
		return err
	}
	if answer.APIVersion == "" {
		return failure(http.StatusBadGateway, "what answers at the engine's address is no Docker Engine")
	}
	sdk, err := e.newSDK()
	if err != nil {
		return err
	}
	sdk.NegotiateAPIVersionPing(answer)
	if sdk.ClientVersion() != e.api().ClientVersion() {
		e.sdk.Swap(sdk).Close()
	}
	e.known.Store(true)
	return nil
}

func (e *engine) close() { e.api().Close() }
