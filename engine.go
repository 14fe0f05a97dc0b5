package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
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
	sdk atomic.Pointer[client.Client]
	// known is set when meet has found a Docker Engine that takes the version which sdk speaks. An error after
	// which another engine may be at the address, such as a lost connection, resets it: the next request meets
	// the engine again before it asks for anything.
	known atomic.Bool
}

// newEngine returns the engine at host, as DOCKER_HOST gives it; if that is empty, at the
// environment's. It does not connect.
func newEngine(host string) (*engine, error) {
	e := &engine{}
	sdk, err := newSDK(cmp.Or(host, os.Getenv(client.EnvOverrideHost), client.DefaultDockerHost))
	e.sdk.Store(sdk)
	return e, err
}

// newSDK returns the SDK's client on the SDK's transport, without the tracing that the SDK wraps
// around it: the wrapped body of an upload would be copied in small pieces, since net/http no
// longer sees its WriteTo.
func newSDK(host string) (*client.Client, error) {
	var plain *http.Client
	sdk, err := client.NewClientWithOpts(client.FromEnv, client.WithHost(host), func(sdk *client.Client) error {
		plain = sdk.HTTPClient()                       // a copy, which gets no tracing
		transport := plain.Transport.(*http.Transport) // the SDK has made no other yet
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

// send makes one call of the engine's API without the SDK, for two reasons. To inspect and to list,
// the SDK decodes all of an answer, of which the daemon needs little. And to attach, it waits
// without an end for an engine that hangs. An answer with another status than the one that is
// wanted, redirections too, is an error.
func (e *engine) send(ctx context.Context, method string, call url.URL, header http.Header, status int) (
	*http.Response, error) {
	sdk := e.api()
	transport := sdk.HTTPClient().Transport
	at, _ := client.ParseHostURL(sdk.DaemonHost()) // what newSDK has parsed too
	call.Scheme, call.Host, call.Path = "http", at.Host, path.Join(at.Path, "/v"+sdk.ClientVersion(), call.Path)
	if own, ok := transport.(*http.Transport); ok && own.TLSClientConfig != nil {
		call.Scheme = "https"
	}
	r := &http.Request{Method: method, URL: &call, Host: at.Host, Header: header}
	if at.Scheme == "unix" {
		r.Host = client.DummyHost
	}
	answer, err := transport.RoundTrip(r.WithContext(ctx))
	if err != nil || answer.StatusCode == status {
		return answer, err
	}
	defer answer.Body.Close()
	var body struct{ Message string }
	text, _ := io.ReadAll(io.LimitReader(answer.Body, 64<<10))
	json.Unmarshal(text, &body) // an attach is refused in plain text
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

// meet asks what answers at the engine's address for the newest version of its API, speaks that from
// now on, and asks again, in that version, what it is: another program, or an engine that refuses the
// version that the environment demands, is an error. It takes pingTime at most.
func (e *engine) meet(ctx context.Context) (err error) {
	defer func() {
		if errors.Is(err, context.DeadlineExceeded) { // nothing was begun
			err = failure(unavailable, "the engine does not answer in time")
		} else if errors.Is(err, io.EOF) {
			err = errUnreadable
		}
		e.known.Store(err == nil)
	}()
	ctx, cancel := context.WithTimeout(ctx, pingTime)
	defer cancel()
	answer, err := e.api().Ping(ctx)
	if err != nil {
		return err
	}
	sdk, err := newSDK(e.api().DaemonHost())
	if err != nil {
		return err
	}
	sdk.NegotiateAPIVersionPing(answer)
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
		return failure(engineFailed, "what answers at the engine's address is no Docker Engine: its parts are %q",
			strings.Join(parts, ", "))
	}
	return nil
}

// meetEngine asks the engine for its version, and once, when there first is one, whether it has
// services that know this bind root by another path: without those nothing may be done. While the
// daemon runs no other can make such services here.
func (s *server) meetEngine(ctx context.Context) error {
	if err := s.engine.meet(ctx); err != nil || s.met.Load() {
		return err
	}
	list, err := s.list(ctx, labelService)
	if err != nil {
		return err
	}
	for _, c := range list {
		path := c.Labels[labelBinds]
		if path == s.binds.path || !mounts(c.Mounts, filepath.Join(path, c.Labels[labelService])) {
			continue
		}
		if err := s.binds.checkMoved(path); errors.Is(err, errMoved) {
			return err
		} else if err != nil {
			s.log.Warn("cannot look at another daemon's bind root", "err", err)
		}
	}
	s.met.Store(true)
	return nil
}

// listed is a container in the engine's list.
type listed struct {
	ID      string
	Names   []string // each with a slash
	ImageID string
	Labels  map[string]string
	State   container.ContainerState
	Mounts  []container.MountPoint
	raw     []byte // all that the engine says of it, as JSON
}

// list returns the engine's containers that have a label. To decode all of each, as the SDK does, and
// write it anew costs more than the engine's own work, and loses what the SDK does not know.
func (s *server) list(ctx context.Context, label string) (all []*listed, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.waits.read)
	defer cancel()
	filter, err := filters.ToJSON(filters.NewArgs(filters.Arg("label", label)))
	if err != nil {
		return nil, err
	}
	call := url.URL{Path: "/containers/json", RawQuery: url.Values{"all": {"1"}, "filters": {filter}}.Encode()}
	answer, err := s.engine.send(ctx, http.MethodGet, call, http.Header{}, http.StatusOK)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return nil, err
	}
	entries := json.NewDecoder(bytes.NewReader(text))
	if first, _ := entries.Token(); first != json.Delim('[') {
		return nil, errUnreadable
	}
	for entries.More() {
		c, begin := &listed{}, entries.InputOffset()
		if err := entries.Decode(c); err != nil {
			return nil, err
		}
		c.raw = bytes.TrimLeft(text[begin:entries.InputOffset()], ", \r\n\t")
		all = append(all, c)
	}
	if _, err := entries.Token(); err != nil { // its end
		return nil, errUnreadable
	}
	return all, nil
}

// ownContainers returns the containers of this daemon by service, of all or of one.
func (s *server) ownContainers(ctx context.Context, id string) (map[string]journal, error) {
	label := labelBinds + "=" + s.binds.path
	if id != "" {
		label = labelService + "=" + id
	}
	list, err := s.list(ctx, label)
	if err != nil {
		return nil, err
	}
	all := map[string]journal{}
	for _, c := range list {
		id := c.Labels[labelService]
		if !serviceID.MatchString(id) || c.Labels[labelBinds] != s.binds.path ||
			!mounts(c.Mounts, filepath.Join(s.binds.path, id)) {
			continue
		}
		// In the middle of a rename the engine shows both names: the first case that fits counts.
		found, named := all[id], func(name string) bool { return slices.Contains(c.Names, "/"+name) }
		switch {
		case named(id):
			found.current = c
		case named(nameNow + id):
			found.now = c
		case named(nextName(id, number(c))):
			found.next = append(found.next, c)
		case named(nameNew + id):
			found.new = c
		default:
			found.strays = append(found.strays, c)
		}
		all[id] = found
	}
	return all, nil
}
