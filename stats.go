package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

const (
	maxFrameAge  = 1500 * time.Millisecond // the engine sends a frame every second
	maxFrame     = 1 << 20                 // bytes
	statsRetries = 10                      // further attempts of one request after a container was replaced
)

// statsParameter matches the query parameters of a stats request.
var statsParameter = regexp.MustCompile(`^stream=(true|false|1|0)$`)

// errContainerReplaced ends a feed whose container has stopped or was replaced. Callers look up the service
// again.
var errContainerReplaced = errors.New("the container has stopped or was replaced")

// stats reports the resource usage of services. All requests for one service share one stream of the engine.
type stats struct {
	containers *containers
	engine     *engine
	timeouts   timeouts
	shutdown   context.Context // ends, with the feeds, when the daemon starts to shut down
	feeds      sync.Map        // of *feed, by service id
}

// frame is one statistics object from the engine.
type frame struct {
	text       []byte        // JSON and a line feed
	arrived    time.Time     // zero if the container does not run: the engine sends only one frame then
	superseded chan struct{} // closed when the next frame has arrived; nil if arrived is zero
}

// serviceStats answers GET /service/{id}/stats with the engine's newest frame. With ?stream=true it sends
// a frame per line until the service stops, perhaps in a restart. Slow readers miss frames; stalled ones are
// disconnected.
func (s *stats) serviceStats(w http.ResponseWriter, r *http.Request) error {
	ctx, id := r.Context(), r.PathValue("id")
	stream, _ := strconv.ParseBool(r.URL.Query().Get("stream"))
	f, err := s.next(ctx, id, time.Now().Add(-maxFrameAge), s.timeouts.engineRead)
	if err != nil {
		return err
	}
	if !stream || f.arrived.IsZero() || r.Method == http.MethodHead { // a HEAD would hang
		writeBytes(w, http.StatusOK, f.text)
		return nil
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	for err == nil && !f.arrived.IsZero() {
		if _, err := w.Write(f.text); err != nil {
			return err
		}
		f, err = s.next(ctx, id, f.arrived, forever) // the feed's watchdog limits the wait
	}
	if api, ok := errors.AsType[*apiError](err); ok && api.kind == kindNoSuchService {
		return nil // deleted, so it has stopped
	}
	return err
}

// next returns a frame of the service that arrived after seen. It waits for one no longer than limit; the
// feed goes on, and a later request may find the frame.
func (s *stats) next(ctx context.Context, id string, seen time.Time, limit time.Duration) (frame, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for range 1 + statsRetries {
		f, err := s.try(ctx, id, seen)
		if err != errContainerReplaced && !errdefs.IsNotFound(err) {
			return f, err
		}
	}
	return frame{}, newAPIError(kindEngineFailed, "the engine sends no statistics of this service")
}

// try is next without retries: it returns errContainerReplaced, or the engine's 404, if the service's
// container changes meanwhile.
func (s *stats) try(ctx context.Context, id string, seen time.Time) (frame, error) {
	if f, ok := s.feeds.Load(id); ok {
		return f.(*feed).wait(ctx, seen)
	}
	current, err := s.containers.lookup(ctx, id)
	if err != nil {
		return frame{}, err
	}
	if !current.State.Running {
		return s.once(ctx, current.ID)
	}
	return s.watch(id, current.ID).wait(ctx, seen)
}

// once returns the single frame that the engine sends of a container that does not run. The engine's answer
// is empty if the container has started and stopped since it was looked up.
func (s *stats) once(ctx context.Context, containerID string) (frame, error) {
	resp, err := s.engine.api().ContainerStats(ctx, containerID, false)
	if err != nil {
		return frame{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && len(text) == 0 {
		err = errContainerReplaced
	}
	return frame{text: text}, err
}

// watch returns the service's feed, and starts one if there is none.
func (s *stats) watch(id, containerID string) *feed {
	f := newFeed(s.shutdown)
	if other, ok := s.feeds.LoadOrStore(id, f); ok {
		f.end(nil)
		return other.(*feed)
	}
	go func() { // ends when follow returns, see there
		err := f.follow(s.engine, containerID, s.timeouts)
		s.feeds.CompareAndDelete(id, f) // first, so that no request finds a feed that has ended
		f.end(err)
	}()
	return f
}

// forget ends the service's feed, if there is one. Operations that stop or replace the service's container
// call it, so that no frame from before the operation is served after it.
func (s *stats) forget(id string) {
	if f, ok := s.feeds.LoadAndDelete(id); ok {
		f.(*feed).end(errContainerReplaced)
	}
}

// feed shares one stream of the engine among all requests for a service's statistics.
type feed struct {
	ctx    context.Context // ends with the feed; its cause is the error of waiting requests
	end    context.CancelCauseFunc
	newest atomic.Pointer[frame]
	asked  atomic.Pointer[time.Time] // when a request last started to wait
}

func newFeed(shutdown context.Context) *feed {
	f := &feed{}
	f.ctx, f.end = context.WithCancelCause(shutdown)
	f.newest.Store(&frame{superseded: make(chan struct{})})
	f.asked.Store(new(time.Now()))
	return f
}

// wait returns the newest frame if it arrived after seen, or else the next one. If the feed has ended, the
// error says why.
func (f *feed) wait(ctx context.Context, seen time.Time) (frame, error) {
	f.asked.Store(new(time.Now()))
	newest := f.newest.Load()
	if !newest.arrived.After(seen) {
		select {
		case <-newest.superseded:
			newest = f.newest.Load()
		case <-f.ctx.Done():
		case <-ctx.Done():
			return frame{}, ctx.Err()
		}
	}
	return *newest, context.Cause(f.ctx)
}

// follow stores the engine's frames of a running container until the container stops, no request asks for
// them, the engine is silent for timeouts.statsFrame, or f.ctx ends. The error says which.
func (f *feed) follow(e *engine, containerID string, timeouts timeouts) error {
	ctx, cancel := context.WithCancelCause(f.ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(timeouts.statsFrame, func() {
		cancel(newAPIError(kindTimeout,
			"the engine has sent no statistics of this service for %s", timeouts.statsFrame))
	})
	defer watchdog.Stop()
	resp, err := e.api().ContainerStats(ctx, containerID, true)
	if err != nil {
		return cmp.Or(context.Cause(ctx), err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxFrame)
	for lines.Scan() && !f.idle(timeouts.statsIdle) {
		watchdog.Reset(timeouts.statsFrame)
		var sample struct{ Read, PreRead time.Time }
		if err := json.Unmarshal(lines.Bytes(), &sample); err != nil { // Scan also returns an incomplete last line
			return cmp.Or(context.Cause(ctx), lines.Err(), err)
		}
		if sample.Read.IsZero() { // the container has stopped: the engine sends frames without samples
			return errContainerReplaced
		}
		if !sample.PreRead.IsZero() { // the first frame has no earlier sample
			next := &frame{append(bytes.Clone(lines.Bytes()), '\n'), time.Now(), make(chan struct{})}
			close(f.newest.Swap(next).superseded)
		}
	}
	return cmp.Or(context.Cause(ctx), lines.Err(), errContainerReplaced)
}

// idle reports whether no request has asked since the newest frame arrived, nor within limit.
func (f *feed) idle(limit time.Duration) bool {
	asked := *f.asked.Load()
	return asked.Before(f.newest.Load().arrived) && time.Since(asked) > limit
}
