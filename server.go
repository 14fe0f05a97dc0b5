package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	maxJSON      = 64 << 10    // bytes of a JSON body; the engine repeats much of it in every list
	drainTimeout = time.Second // for reading what a client still sends after an error
)

// A route is one line of the API. All of them need the core key: see ServeHTTP.
type route struct {
	pattern  string         // as for [http.ServeMux]; also served under /v1
	success  int            // status, if handle writes none
	body     int64          // maximum request body, in bytes, unless it is JSON
	json     bool           // the body is JSON, of at most maxJSON bytes
	limit    time.Duration  // forever: until the client disconnects or the daemon shuts down
	detached bool           // keeps running until limit if the client disconnects
	offline  bool           // works without the engine
	query    *regexp.Regexp // each query parameter must match this, as name=value; nil allows none
	handle   func(http.ResponseWriter, *http.Request) error
}

// routes is the whole API.
func (s *server) routes() []route {
	svc, change := s.services, s.stopTimeout+s.timeouts.engineRead
	return []route{
		{pattern: "POST /service", success: 201, json: true, limit: s.createTimeout, handle: svc.handleCreate},
		{pattern: "GET /service", success: 200, limit: s.timeouts.engineRead, handle: svc.handleList},
		{pattern: "GET /service/{id}", success: 200, limit: s.timeouts.engineRead, handle: svc.handleInspect},
		{pattern: "PUT /service/{id}", success: 204, json: true, limit: s.createTimeout, detached: true,
			handle: svc.handlePut},
		{pattern: "GET /service/{id}/params", success: 200, limit: s.timeouts.engineRead, offline: true,
			handle: svc.handleParams},
		{pattern: "DELETE /service/{id}", success: 204, limit: s.createTimeout, detached: true,
			handle: svc.handleDelete},
		{pattern: "POST /service/{id}/ctl", success: 204, json: true, limit: change, detached: true,
			handle: svc.handleControl},
		{pattern: "GET /service/{id}/stats", success: 200, limit: forever, query: statsParameter,
			handle: s.stats.serviceStats},
		{pattern: "GET /service/{id}/logs", success: 200, limit: forever, query: logsParameter,
			handle: s.console.serviceLogs},
		{pattern: "POST /service/{id}/stdin", success: 204, body: math.MaxInt64, limit: forever,
			handle: s.console.serviceStdin},
		{pattern: "POST /service/{id}/tty", success: 204, json: true, limit: s.timeouts.engineRead,
			handle: s.console.resizeTTY},
		{pattern: "PATCH /service/{id}/env", success: 204, json: true, limit: change, detached: true,
			offline: true, handle: svc.handleSetEnv},
		{pattern: "GET /docker/image", success: 200, limit: s.timeouts.engineRead, handle: s.images.listImages},
		{pattern: "DELETE /docker/image/{image}", success: 204, limit: s.timeouts.engineRead, detached: true,
			handle: s.images.removeImage},
		{pattern: "POST /docker/image", success: 201, body: s.maxImageBytes, limit: forever,
			handle: s.images.importImage},
		{pattern: "GET /machine", success: 200, limit: s.timeouts.engineRead, handle: s.machine},
		{pattern: "GET /health", success: 204, limit: s.timeouts.engineRead, handle: s.health},
	}
}

// server answers the core's requests. newServer sets its fields.
type server struct {
	config
	key      keyDigest
	engine   *engine
	binds    *bindRoot
	services *services
	log      *slog.Logger
	console  *console
	images   *images
	stats    *stats
	rejected *rejectedLog
	mux      *http.ServeMux
	software string          // for the Server header
	ctx      context.Context // done when the daemon no longer waits for operations in progress
	shutdown context.Context // done when the daemon starts to shut down: streams end with it
}

// newServer registers each route with and without /v1, and each path once more for all other methods:
// because "/" matches every path, [http.ServeMux] would answer 404 and not 405.
func newServer(life, serving context.Context, cfg config, key keyDigest, e *engine, b *bindRoot,
	log *slog.Logger) *server {
	cfg.binds = b.path // absolute
	own := &containers{engine: e, binds: b, locks: newKeyedMutex(), timeout: cfg.timeouts.engineRead}
	s := &server{config: cfg, key: key, engine: e, binds: b, log: log, ctx: life, shutdown: serving,
		rejected: &rejectedLog{log: log}, mux: http.NewServeMux(),
		software: "duxcore-daemon/" + versionNumber()}
	s.images = &images{engine: e, binds: b, log: log, ctx: life, shutdown: serving,
		createTimeout: cfg.createTimeout, timeouts: cfg.timeouts, tempPrefix: tempPrefix(b.path)}
	s.stats = &stats{containers: own, engine: e, timeouts: cfg.timeouts, shutdown: serving}
	s.console = &console{containers: own, engine: e, stdinLocks: newKeyedMutex(), timeouts: cfg.timeouts,
		shutdown: serving}
	s.services = &services{config: cfg, engine: e, binds: b, containers: own, locks: own.locks, log: log,
		fetcher: newFetcher(cfg.fetchAllow), ensureImage: s.images.ensure, holdImage: s.images.hold,
		tidyImages: s.images.removeUnfinished, forgetStats: s.stats.forget, ctx: life}
	methods := map[string][]string{}
	for _, rt := range s.routes() {
		method, pattern, _ := strings.Cut(rt.pattern, " ")
		for _, prefix := range []string{"", "/v1"} {
			s.mux.HandleFunc(method+" "+prefix+pattern, func(w http.ResponseWriter, r *http.Request) {
				if err := s.dispatch(rt, w.(*responseWriter), r); err != nil {
					s.writeError(w, r, err)
				}
			})
			methods[prefix+pattern] = append(methods[prefix+pattern], method)
		}
	}
	for pattern, allowed := range methods {
		slices.Sort(allowed)
		s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", strings.Join(allowed, ", "))
			s.writeError(w, r, newAPIError(kindMethodNotAllowed, "%s is not allowed here", r.Method))
		})
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { s.writeError(w, r, errNoSuchPath) })
	return s
}

// ServeHTTP authenticates, routes and logs a request. A request without the key gets no further than the key
// check.
func (s *server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	start := time.Now()
	w := &responseWriter{ResponseWriter: rw, ctl: http.NewResponseController(rw), wait: s.timeouts.clientWrite}
	defer s.finishRequest(w, r, r.Body, start)
	if len(r.TransferEncoding) > 0 {
		// net/http drops a Content-Length that was sent together with it, and RFC 9112, section 6.1, requires
		// closing the connection after such a request. So close it after every chunked one.
		w.Header().Set("Connection", "close")
	}
	if !s.key.authorizes(r) {
		w.Header().Set("Connection", "close")
		s.writeError(w, r, newAPIError(kindUnauthorized, "Accessing this daemon requires core authorization."))
		return
	}
	markAuthenticated(r)
	w.Header().Set("Server", s.software)
	if !r.ProtoAtLeast(1, 1) { // in HTTP/1.0 an aborted answer looks like a whole one
		s.writeError(w, r, newAPIError(kindHTTPVersion, "HTTP/1.1 is required"))
		return
	}
	if p := r.URL.EscapedPath(); path.Clean("/"+p) != p {
		s.writeError(w, r, errNoSuchPath) // http.ServeMux would redirect, or answer in plain text
	} else {
		s.mux.ServeHTTP(w, r)
	}
}

// finishRequest logs a request whose handler has returned or panicked, and sets the deadlines for what
// net/http does next: flush the answer and drain the body. body is the original, without the
// [http.MaxBytesReader].
func (s *server) finishRequest(w *responseWriter, r *http.Request, body io.ReadCloser, start time.Time) {
	// In a quiet stream, the deadline of the last Write has passed: the final chunk could not be sent.
	w.ctl.SetWriteDeadline(time.Now().Add(w.wait))
	// net/http reads up to 256 KiB of the rest of a body (maxPostHandlerReadBytes): limit that. If there is no
	// body, set no deadline: such a request may have a long answer, and if flushing it took longer, the
	// background read (connReader) would fail and cancel the context of the connection's later requests. The
	// answer to a request with a body is short: net/http clears the deadline (abortPendingRead) in time.
	if body != http.NoBody {
		w.ctl.SetReadDeadline(time.Now().Add(drainTimeout))
	}
	if w.status == http.StatusUnauthorized {
		s.rejected.add(r.RemoteAddr + ": no core key, or a wrong one")
		return
	}
	s.logRequest(w, r, start)
	if w.status >= 400 {
		// With more than 256 KiB unread, net/http closes the connection, the kernel sends a RST, and a client that
		// is still sending may never see the answer. So drain the body, for drainTimeout.
		w.ctl.Flush()
		io.Copy(io.Discard, body)
	}
}

// logRequest logs a request. The lines of changes are the audit trail; those of successful reads are for
// debugging.
func (s *server) logRequest(w *responseWriter, r *http.Request, start time.Time) {
	level := slog.LevelInfo
	if w.status < 400 && (r.Method == http.MethodGet || r.Method == http.MethodHead) {
		level = slog.LevelDebug
	}
	fields := []any{"method", r.Method, "route", r.Pattern, "id", truncate(cmp.Or(w.id, r.PathValue("id"))),
		"status", w.status, "bytes", w.written,
		"duration", time.Since(start).Round(time.Microsecond), "remote", r.RemoteAddr}
	if w.op != "" {
		fields = append(fields, "op", w.op)
	}
	if id := r.Header.Get("X-Request-Id"); requestID.MatchString(id) {
		fields = append(fields, "request_id", id)
	}
	s.log.Log(context.Background(), level, "request", fields...)
}

// requestID matches the values of X-Request-Id that are logged.
var requestID = regexp.MustCompile(`^[A-Za-z0-9._:-]{1,64}$`)

// dispatch does what all routes have in common, then calls the handler.
func (s *server) dispatch(rt route, w *responseWriter, r *http.Request) error {
	if id := r.PathValue("id"); strings.Contains(rt.pattern, "{id}") && !serviceID.MatchString(id) {
		return noSuchService(id)
	}
	err := rt.checkQuery(r.URL.RawQuery)
	if err != nil {
		return err
	}
	if rt.body == 0 && !rt.json && r.ContentLength != 0 { // or net/http would read the body before it answers
		return newAPIError(kindTooLarge, "this request takes no body")
	}
	maxBody := rt.body
	if rt.json {
		maxBody = maxJSON
	}
	if r.ContentLength > maxBody {
		return &http.MaxBytesError{Limit: maxBody}
	}
	r.Body = http.MaxBytesReader(w.ResponseWriter, r.Body, maxBody)
	if rt.json {
		if err := s.readBody(w, r); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(r.Context(), rt.limit)
	if rt.detached {
		cancel()
		ctx, cancel = detached(r.Context(), s.ctx, rt.limit)
	}
	defer cancel()
	if rt.limit == forever {
		defer context.AfterFunc(s.shutdown, cancel)()
	}
	if !rt.offline {
		if err := s.engine.ready(ctx); err != nil {
			return err
		}
	}
	if err := rt.handle(w, r.WithContext(ctx)); err != nil {
		return err
	}
	if w.status == 0 {
		w.WriteHeader(rt.success)
	}
	return nil
}

// checkQuery returns an error for a parameter that the route does not have, whose value is not allowed, or
// that is given twice: no pattern matches two values with a comma between them.
func (rt route) checkQuery(text string) error {
	query, err := url.ParseQuery(text)
	if err != nil {
		return badRequest("the query cannot be read")
	}
	for name, values := range query {
		parameter := name + "=" + strings.Join(values, ",")
		if rt.query == nil || !rt.query.MatchString(parameter) {
			return badRequest("%.100q: no such parameter, or not one of its values", parameter)
		}
	}
	return nil
}

// writeError answers with an error. If the header was already sent, it logs the error and aborts the
// connection, so that no client takes a part of an answer for the whole. Nothing else writes errors.
func (s *server) writeError(rw http.ResponseWriter, r *http.Request, err error) {
	kind, description := describe(err)
	if kind == kindUnavailable {
		rw.Header().Set("Retry-After", "1")
		if !errors.Is(err, context.Canceled) { // the client did not disconnect
			s.engine.lost() // it may come back as another version
		}
	}
	if kind == kindInternal {
		s.log.Error("request failed", "route", r.Pattern, "id", r.PathValue("id"), "err", err)
	}
	if rw.(*responseWriter).status != 0 {
		if !errors.Is(err, context.Canceled) { // neither the client's doing nor a shutdown
			s.log.Warn("answer aborted", "route", r.Pattern, "id", r.PathValue("id"), "err", description)
		}
		panic(http.ErrAbortHandler)
	}
	writeJSON(rw, kind.status, map[string]any{"error": struct {
		Code        int    `json:"code"`
		Reason      string `json:"reason"`
		Description string `json:"description"`
		Kind        string `json:"kind"`
	}{kind.status, http.StatusText(kind.status), description, kind.name}})
}

// readBody reads a whole JSON body first, so that no handler waits for the client.
func (s *server) readBody(w *responseWriter, r *http.Request) error {
	w.ctl.SetReadDeadline(time.Now().Add(s.timeouts.jsonBody))
	text, err := io.ReadAll(r.Body)
	// net/http clears the deadline when a body ends. Without a body, it reads on already (connReader), and would
	// cancel the request's context.
	w.ctl.SetReadDeadline(time.Time{})
	if isType[*http.MaxBytesError](err) {
		return err
	}
	if err != nil {
		return badRequest("the body is incomplete or came too slowly")
	}
	r.Body = io.NopCloser(bytes.NewReader(text))
	return nil
}

// health answers GET /health: 204 if the engine and the bind root are usable.
func (s *server) health(_ http.ResponseWriter, r *http.Request) error {
	if err := s.engine.negotiate(r.Context()); err != nil {
		return err
	}
	return s.services.checkRoot(r.Context())
}

// machine answers GET /machine with what a core needs to place services. Sizes are in bytes.
func (s *server) machine(w http.ResponseWriter, r *http.Request) error {
	info, err := s.engine.api().Info(r.Context())
	if err != nil {
		return err
	}
	var disk syscall.Statfs_t
	if err := syscall.Fstatfs(int(s.binds.dir.Fd()), &disk); err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, map[string]any{
		"version": versionNumber(), "engine": info.ServerVersion, "api": s.engine.api().ClientVersion(),
		"arch": info.Architecture, "cpus": info.NCPU, "memory": info.MemTotal,
		"bind_root": map[string]uint64{"size": disk.Blocks * uint64(disk.Frsize),
			"free": disk.Bavail * uint64(disk.Frsize), "inodes": disk.Files, "free_inodes": disk.Ffree},
	})
	return nil
}
