package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	statsAge   = 1500 * time.Millisecond // the engine sends a frame every second
	statsTries = 3                       // feeds that may end without a frame before one request gives up
	maxFrame   = 1 << 20                 // bytes
)

// statsParameter is what the query of a request for statistics may hold: anything else is a 400.
var statsParameter = regexp.MustCompile(`^stream=(true|false|1|0)$`)

// What the engine writes where it has no sample: for a container that does not run,
// whose stream it does not end, and for the sample before the first.
var (
	noSample        = []byte(`"read":"0001-01-01T00:00:00Z"`)
	noEarlierSample = []byte(`"preread":"0001-01-01T00:00:00Z"`)
)

// serviceStats answers GET /service/{id}/stats with the engine's newest frame; with
// ?stream=true with a line for each, from one container of the service to the next,
// until it does not run. Who reads slowly gets fewer frames; who does not is dropped.
func (s *server) serviceStats(w http.ResponseWriter, r *http.Request) error {
	stream, _ := strconv.ParseBool(r.URL.Query().Get("stream"))
	stream = stream && r.Method == http.MethodGet // HEAD would not end
	ctx := r.Context()
	if !stream {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.waits.read)
		defer cancel()
	}
	seen, begun, ends := time.Now().Add(-statsAge), false, 0
	for {
		feed, containerID, err := s.stats.watch(ctx, s, r.PathValue("id"))
		if err != nil || feed == nil && begun {
			return err
		}
		var frame []byte
		if feed == nil {
			frame, err = s.askStats(ctx, containerID)
		} else {
			frame, seen, err = feed.newer(ctx, seen)
		}
		if err == errOperated {
			continue // whatever is there now
		}
		if err == io.EOF || errdefs.IsNotFound(err) { // it has stopped, or another has just taken its place
			if ends++; ends <= statsTries {
				continue
			}
			err = failure(engineFailed, "the engine sends no statistics of this service")
		}
		if err != nil || feed == nil || !stream {
			return passOn(w, frame, err)
		}
		w.Header().Set("Content-Type", "application/x-ndjson")
		begun, ends = true, 0
		if _, err := w.Write(frame); err != nil {
			return err
		}
	}
}

// askStats returns the engine's one frame of a container that does not run.
func (s *server) askStats(ctx context.Context, containerID string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, s.waits.read)
	defer cancel()
	stats, err := s.engine.api().ContainerStats(ctx, containerID, false)
	if err != nil {
		return nil, err
	}
	defer stats.Body.Close()
	return io.ReadAll(stats.Body)
}

// statsFeeds has one feed for each service that is watched.
type statsFeeds struct {
	mu   sync.Mutex // guards the feeds' fields too
	byID map[string]*statsFeed
}

// statsFeed shares one engine stream among all who watch a service.
type statsFeed struct {
	mu      *sync.Mutex
	end     context.CancelFunc
	waits   waits
	asked   time.Time     // by the last request
	frame   []byte        // the newest
	arrived time.Time     // when
	changed chan struct{} // closed at the next frame and at the end
	ended   error         // io.EOF, or errOperated
}

// errOperated ends a feed whose container an operation may have stopped or replaced.
var errOperated = errors.New("an operation ended the feed")

// watch returns the service's feed, or the id of its container if that does not run.
func (f *statsFeeds) watch(ctx context.Context, s *server, id string) (*statsFeed, string, error) {
	f.mu.Lock()
	feed := f.byID[id]
	f.mu.Unlock()
	if feed != nil {
		return feed, "", nil
	}
	current, err := s.containers.lookup(ctx, id)
	if err != nil {
		return nil, "", err
	}
	if !current.State.Running {
		return nil, current.ID, nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if feed = f.byID[id]; feed == nil {
		life, end := context.WithCancel(s.serving)
		feed = &statsFeed{mu: &f.mu, end: end, waits: s.waits, asked: time.Now(), changed: make(chan struct{})}
		f.byID[id] = feed
		go func() { // ends with the container, the last request, forget or the daemon
			feed.follow(life, s.engine, current.ID)
			f.forget(id, feed)
		}()
	}
	return feed, "", nil
}

// forget ends a feed, or whichever the service has. An operation that may put another
// container in a service's place calls it, so that no frame of the earlier one follows.
func (f *statsFeeds) forget(id string, feed *statsFeed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	why := io.EOF
	if feed == nil {
		feed, why = f.byID[id], errOperated
	}
	if feed == nil || feed.ended != nil {
		return
	}
	delete(f.byID, id)
	feed.end()
	feed.ended = why
	close(feed.changed)
}

// newer returns the newest frame if it arrived after seen, and else waits for one that
// does. It returns why the feed has ended, if it has.
func (f *statsFeed) newer(ctx context.Context, seen time.Time) (frame []byte, arrived time.Time, err error) {
	for {
		f.mu.Lock()
		f.asked = time.Now()
		frame, arrived, changed, ended := f.frame, f.arrived, f.changed, f.ended
		f.mu.Unlock()
		if ended != nil {
			return nil, seen, ended
		}
		if arrived.After(seen) {
			return frame, arrived, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, seen, ctx.Err()
		}
	}
}

// follow reads the engine's stream of a container as long as that runs and is watched.
func (f *statsFeed) follow(ctx context.Context, e *engine, containerID string) {
	hang := time.AfterFunc(f.waits.frame, f.end)
	defer hang.Stop()
	answer, err := e.api().ContainerStats(ctx, containerID, true)
	if err != nil {
		return // who waits looks the service up again, and sees why
	}
	defer answer.Body.Close()
	lines := bufio.NewScanner(answer.Body)
	lines.Buffer(nil, maxFrame)
	for lines.Scan() {
		hang.Reset(f.waits.frame)
		if bytes.Contains(lines.Bytes(), noSample) || !f.publish(lines.Bytes()) {
			return
		}
	}
}

// publish makes a complete frame the newest. It reports whether there is need for another.
func (f *statsFeed) publish(frame []byte) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended != nil || time.Since(f.asked) > f.waits.linger {
		return false
	}
	if !bytes.Contains(frame, noEarlierSample) {
		f.frame, f.arrived = append(bytes.Clone(frame), '\n'), time.Now()
		close(f.changed)
		f.changed = make(chan struct{})
	}
	return true
}
