//go:build integration

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"
)

// The benchmarks do each thing through the daemon and then without it, in turn, so
// that what else the machine does falls on both. x-engine is how many times as fast
// as the engine itself the daemon is; x-tar compares with curl and tar. What is named
// proxy went to the engine through a proxy that checks nothing: what any hop costs.

// direct is a client of the engine's socket, without the SDK.
func direct(b *testing.B) *http.Client {
	engine, err := client.NewClientWithOpts(client.FromEnv)
	must(b, err)
	transport := &http.Transport{MaxIdleConnsPerHost: 64,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return engine.Dialer()(ctx)
		}}
	b.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// throughProxy returns the address of the standard library's proxy to the engine's socket.
func throughProxy(b *testing.B, engine *http.Client) string {
	proxy := httptest.NewServer(&httputil.ReverseProxy{Transport: engine.Transport,
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: "engine"}) }})
	b.Cleanup(proxy.Close)
	return proxy.URL
}

// fetchAll sends one request and reads the answer.
func fetchAll(b *testing.B, c *http.Client, r *http.Request) []byte {
	response, err := c.Do(r)
	if err != nil {
		b.Error(err)
		return nil
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode >= 300 {
		b.Errorf("%s %s: %d %s %v", r.Method, r.URL, response.StatusCode, body, err)
	}
	return body
}

// latencies calls do count times in each of several clients, and returns how long each
// call took, sorted, and how long all of it.
func latencies(clients, count int, do func()) (each []time.Duration, all time.Duration) {
	var group sync.WaitGroup
	each = make([]time.Duration, clients*count)
	begin := time.Now()
	for c := range clients {
		group.Go(func() {
			for i := range count {
				start := time.Now()
				do()
				each[c*count+i] = time.Since(start)
			}
		})
	}
	group.Wait()
	all = time.Since(begin)
	slices.Sort(each)
	return each, all
}

func BenchmarkInspect(b *testing.B) {
	m := newMachine(b, nil)
	// without a timeout, as the engine's
	m.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	id, engine := m.create(b, ""), direct(b)
	proxy := throughProxy(b, engine)
	ask := func(c *http.Client, url string) {
		r, _ := http.NewRequest("GET", url+"/containers/"+id+"/json", nil)
		fetchAll(b, c, r)
	}
	for _, clients := range []int{1, 16} {
		b.Run(fmt.Sprintf("%d-clients", clients), func(b *testing.B) {
			ways := []func(){
				func() { fetchAll(b, m.client, m.request(b, "GET", "/service/"+id, nil)) },
				func() { ask(engine, "http://engine") },
				func() { ask(m.client, proxy) },
			}
			var median, all [3]time.Duration
			for b.Loop() {
				for i, way := range ways {
					each, sum := latencies(clients, 200, way)
					median[i], all[i] = median[i]+each[len(each)/2], all[i]+sum
				}
			}
			b.ReportMetric(float64(median[0].Microseconds())/float64(b.N), "µs-median")
			b.ReportMetric(float64((median[0]-median[1]).Microseconds())/float64(b.N), "µs-more")
			b.ReportMetric(float64((median[2]-median[1]).Microseconds())/float64(b.N), "µs-more-proxy")
			b.ReportMetric(all[1].Seconds()/all[0].Seconds(), "x-engine")
			b.ReportMetric(all[1].Seconds()/all[2].Seconds(), "x-engine-proxy")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func BenchmarkStats(b *testing.B) {
	m := newMachine(b, nil)
	id, engine := m.create(b, ""), direct(b)
	m.ctl(b, id, "start")
	get := func() { fetchAll(b, m.client, m.request(b, "GET", "/service/"+id+"/stats", nil)) }
	get()
	var ours, theirs time.Duration
	for b.Loop() {
		each, _ := latencies(1, 100, get)
		ours += each[len(each)/2]
		_, all := latencies(1, 1, func() {
			r, _ := http.NewRequest("GET", "http://engine/containers/"+id+"/stats?stream=false", nil)
			fetchAll(b, engine, r)
		})
		theirs += all
	}
	b.ReportMetric(float64(ours.Microseconds())/float64(b.N), "µs-median")
	b.ReportMetric(theirs.Seconds()/ours.Seconds(), "x-engine")
	b.ReportMetric(0, "ns/op")
}

func BenchmarkImport(b *testing.B) {
	m := newMachine(b, nil)
	engine, content := direct(b), make([]byte, 256<<20)
	proxy := throughProxy(b, engine)
	rand.Read(content)
	files := make([]entry, 5000) // as a small distribution has
	for i := range files {
		files[i] = imageFile(fmt.Sprintf("usr/lib/package-%d/file-%d", i/50, i),
			string(content[i<<10:][:2<<10+(i%10)<<13]))
	}
	for name, archive := range map[string][]byte{
		"large-file":       archiveOf(imageFile("large", string(content))),
		"root-file-system": archiveOf(files...),
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(archive)))
			raw := func(url string) *http.Request {
				r, _ := http.NewRequest("POST", url+"/images/create?fromSrc=-", bytes.NewReader(archive))
				return r
			}
			var took [3]time.Duration
			for b.Loop() {
				for i, way := range []func() []byte{
					func() []byte {
						return fetchAll(b, m.client, m.request(b, "POST", "/docker/image", bytes.NewReader(archive)))
					},
					func() []byte { return fetchAll(b, engine, raw("http://engine")) },
					func() []byte { return fetchAll(b, m.client, raw(proxy)) },
				} {
					begin := time.Now()
					answer := way()
					took[i] += time.Since(begin)
					removeImage(b, m, answer)
				}
			}
			b.ReportMetric(took[0].Seconds()/float64(b.N), "s")
			b.ReportMetric(took[1].Seconds()/took[0].Seconds(), "x-engine")
			b.ReportMetric(took[1].Seconds()/took[2].Seconds(), "x-engine-proxy")
		})
	}
}

// removeImage removes the image whose id an answer holds.
func removeImage(b *testing.B, m *machine, answer []byte) {
	_, rest, ok := strings.Cut(string(answer), "sha256:")
	if !ok || len(rest) < 64 {
		b.Fatalf("no image id in %s", answer)
	}
	r, _ := http.NewRequest("DELETE", "http://engine/images/sha256:"+rest[:64]+"?force=1", nil)
	fetchAll(b, direct(b), r)
}

func BenchmarkUnpack(b *testing.B) {
	large := make([]byte, 256<<20)
	rand.Read(large[:len(large)/2]) // half of it compresses
	small := make([]entry, 10_000)
	for i := range small {
		small[i] = imageFile(fmt.Sprintf("package-%d/src/file-%d.js", i/100, i),
			strings.Repeat("some text of a small file\n", 100))
	}
	files := make([]entry, 5000) // 76 MB, of which a third does not compress
	for i := range files {
		size := 2<<10 + (i%10)*3<<10
		files[i] = imageFile(fmt.Sprintf("usr/lib/package-%d/file-%d", i/50, i),
			string(large[i<<10:][:size/3])+strings.Repeat("some text\n", size/15))
	}
	for name, archive := range map[string][]byte{
		"large-file":       gzipped(archiveOf(imageFile("large", string(large)))),
		"small-files":      gzipped(archiveOf(small...)),
		"root-file-system": gzipped(archiveOf(files...)),
	} {
		b.Run(name, func(b *testing.B) {
			source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Write(archive)
			}))
			defer source.Close()
			var ours, theirs time.Duration
			for b.Loop() {
				dir := b.TempDir()
				root, err := os.OpenRoot(dir)
				must(b, err)
				begin := time.Now()
				limits := unpackLimits{bytes: math.MaxInt32, entries: math.MaxInt32}
				must(b, newFetcher(loopback).fetch(b.Context(), source.URL, root, limits, nil))
				ours += time.Since(begin)
				root.Close()
				dir = b.TempDir()
				begin = time.Now()
				command := exec.Command("sh", "-c", "curl -s "+source.URL+" | tar xz -C "+dir)
				if output, err := command.CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, output)
				}
				theirs += time.Since(begin)
			}
			b.ReportMetric(theirs.Seconds()/ours.Seconds(), "x-tar")
		})
	}
}

// BenchmarkCreate makes a service without contents and deletes it again, in turn with the
// three calls that the engine alone would need: create, rename, remove.
func BenchmarkCreate(b *testing.B) {
	m := newMachine(b, nil)
	var made, removed, theirs []time.Duration
	for b.Loop() {
		for range 10 {
			start := time.Now()
			id := m.create(b, "")
			made = append(made, time.Since(start))
			start = time.Now()
			m.do(b, "DELETE", "/service/"+id, "").want(b, http.StatusNoContent)
			removed = append(removed, time.Since(start))

			start = time.Now()
			config := &container.Config{Image: m.image, Cmd: []string{"/probe"}}
			c, err := m.engine.ContainerCreate(b.Context(), config, nil, nil, nil, id+".new")
			if err == nil {
				err = m.engine.ContainerRename(b.Context(), c.ID, id)
			}
			if err == nil {
				err = m.engine.ContainerRemove(b.Context(), c.ID, container.RemoveOptions{Force: true})
			}
			must(b, err)
			theirs = append(theirs, time.Since(start))
		}
	}
	median := func(all []time.Duration) float64 {
		slices.Sort(all)
		return all[len(all)/2].Seconds() * 1000
	}
	b.ReportMetric(median(made), "ms-create")
	b.ReportMetric(median(removed), "ms-delete")
	b.ReportMetric(median(theirs), "ms-engine")
	b.ReportMetric(median(theirs)/(median(made)+median(removed)), "x-engine")
	b.ReportMetric(0, "ns/op")
}

var growth = flag.Int("growth", 100, "how many services BenchmarkGrowth runs at most")

// These benchmarks watch the daemon as a process of its own, as it is shipped.

// newProcess starts a daemon and gives it the probe's image.
func newProcess(b *testing.B, args ...string) (m *machine, pid int) {
	b.Helper()
	engine, err := client.NewClientWithOpts(client.FromEnv, client.WithAPIVersionNegotiation())
	must(b, err)
	b.Cleanup(func() { engine.Close() })
	m = &machine{engine: engine}
	m.daemon, pid = wireProcess(b, client.DefaultDockerHost, args...)
	m.client.Timeout = 0
	m.client.Transport.(*http.Transport).MaxIdleConnsPerHost = 64
	m.image = m.importImage(b, string(archiveOf(imageFile("probe", buildProbe(b)))))
	m.cleanUp(b, m.binds, m.image)
	return m, pid
}

// wireMemory returns what the process has in memory, and the most it ever had, in bytes.
func wireMemory(t testing.TB, pid int) (now, peak int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for field, value := range map[string]*int{"VmRSS": &now, "VmHWM": &peak} {
		found := regexp.MustCompile(field + `:\s+(\d+) kB`).FindSubmatch(status)
		if *value, err = strconv.Atoi(string(found[1])); err != nil {
			t.Fatal(err)
		}
		*value <<= 10
	}
	return now, peak
}

// peak reports the most memory that the daemon ever had.
func peak(b *testing.B, pid int) {
	_, bytes := wireMemory(b, pid)
	b.ReportMetric(float64(bytes)/(1<<20), "MiB-peak")
	b.ReportMetric(0, "ns/op")
}

// processorTime returns what a process has used of processors.
func processorTime(b *testing.B, pid int) (used time.Duration) {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(b, err)
	_, rest, _ := strings.Cut(string(stat), ") ")
	// utime and stime of proc_pid_stat(5), in hundredths of a second
	for _, field := range strings.Fields(rest)[11:13] {
		ticks, err := strconv.Atoi(field)
		must(b, err)
		used += time.Duration(ticks) * 10 * time.Millisecond
	}
	return used
}

// enginePID returns the engine's process.
func enginePID(b *testing.B) (pid int) {
	b.Helper()
	names, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, name := range names {
		if comm, _ := os.ReadFile(name); string(comm) == "dockerd\n" {
			pid, _ = strconv.Atoi(strings.Split(name, "/")[2])
		}
	}
	if pid == 0 {
		b.Fatal("no dockerd runs here")
	}
	return pid
}

func BenchmarkStart(b *testing.B) {
	var all time.Duration
	program, err := shipped()
	must(b, err)
	info, err := program.Stat()
	must(b, err)
	for b.Loop() {
		begin := time.Now()
		d, pid := wireProcess(b, client.DefaultDockerHost)
		d.do(b, "GET", "/health", "").want(b, 204)
		all += time.Since(begin)
		now, _ := wireMemory(b, pid)
		b.ReportMetric(float64(now)/(1<<20), "MiB-resident")
	}
	b.ReportMetric(float64(all.Milliseconds())/float64(b.N), "ms-to-answer")
	b.ReportMetric(float64(info.Size())/1e6, "MB-binary")
	b.ReportMetric(0, "ns/op")
}

// zeros are an endless file.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return copy(p, make([]byte, len(p))), nil }

// writeTree writes a tar archive of one large file and many small ones.
func writeTree(w io.Writer, size int64, files int) error {
	archive := tar.NewWriter(w)
	err := archive.WriteHeader(&tar.Header{Name: "large", Mode: 0o644, Size: size})
	if err == nil {
		_, err = io.CopyN(archive, zeros{}, size)
	}
	for i := 0; i < files && err == nil; i++ {
		err = archive.WriteHeader(&tar.Header{Name: fmt.Sprintf("directory-%d/file-%d", i/100, i), Mode: 0o644,
			Size: 100})
		if err == nil {
			_, err = io.CopyN(archive, zeros{}, 100)
		}
	}
	if err == nil {
		err = archive.Close()
	}
	return err
}

// BenchmarkMemory passes 2 GiB through an import, and 2 GiB with 50,000 files through an archive.
func BenchmarkMemory(b *testing.B) {
	const size = 2 << 30
	b.Run("import", func(b *testing.B) {
		m, pid := newProcess(b)
		for b.Loop() {
			body, sink := io.Pipe()
			go func() { sink.CloseWithError(writeTree(sink, size, 0)) }() // ends with the request
			removeImage(b, m, fetchAll(b, m.client, m.request(b, "POST", "/docker/image", body)))
		}
		peak(b, pid)
	})
	b.Run("unpack", func(b *testing.B) {
		m, pid := newProcess(b, "-fetch-allow", "127.0.0.0/8")
		var archive bytes.Buffer
		zipped, _ := gzip.NewWriterLevel(&archive, gzip.BestSpeed)
		if err := writeTree(zipped, size, 50_000); err != nil || zipped.Close() != nil {
			b.Fatal(err)
		}
		source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Write(archive.Bytes())
		}))
		defer source.Close()
		for b.Loop() {
			id := m.create(b, `"bind_contents":"`+source.URL+`"`)
			m.do(b, "DELETE", "/service/"+id, "").want(b, 204)
		}
		peak(b, pid)
	})
}

// BenchmarkGrowth runs ever more services, up to -growth, and asks about them.
func BenchmarkGrowth(b *testing.B) {
	m, pid := newProcess(b)
	engine := direct(b)
	var ids []string
	proxy := throughProxy(b, engine)
	for _, count := range []int{1, 10, 100, 500, 1000} {
		if count > *growth {
			break
		}
		for len(ids) < count {
			ids = append(ids, m.create(b, ""))
			m.ctl(b, ids[len(ids)-1], "start")
		}
		b.Run(fmt.Sprint(len(ids)), func(b *testing.B) { growthOf(b, m, pid, engine, proxy, ids) })
	}
}

func growthOf(b *testing.B, m *machine, pid int, engine *http.Client, proxy string, ids []string) {
	median := func(c *http.Client, request func() *http.Request) float64 {
		each, _ := latencies(1, 20, func() { fetchAll(b, c, request()) })
		return float64(each[len(each)/2].Microseconds())
	}
	ask := func(path string) float64 {
		return median(m.client, func() *http.Request { return m.request(b, "GET", path, nil) })
	}
	askEngine := func(path string) float64 {
		return median(engine, func() *http.Request {
			r, _ := http.NewRequest("GET", "http://engine"+path, nil)
			return r
		})
	}
	for b.Loop() {
		b.ReportMetric(ask("/service"), "µs-list")
		b.ReportMetric(askEngine("/containers/json?all=1"), "µs-engine-list")
		b.ReportMetric(median(m.client, func() *http.Request {
			r, _ := http.NewRequest("GET", proxy+"/containers/json?all=1", nil)
			return r
		}), "µs-proxy-list")
		b.ReportMetric(ask("/service/"+ids[0]), "µs-inspect")
		b.ReportMetric(askEngine("/containers/"+ids[0]+"/json"), "µs-engine-inspect")
		late := pollStats(b, m.daemon, ids, len(ids)) // opens the engine's streams
		b.ReportMetric(ask("/service/"+ids[0]+"/stats"), "µs-stats")
		daemonBefore, engineBefore, begin := processorTime(b, pid), processorTime(b, enginePID(b)), time.Now()
		rounds := 0.0 // fewer than ten where the engine cannot keep up
		for second := time.Tick(time.Second); rounds == 0 || time.Since(begin) < 10*time.Second; rounds++ {
			late += pollStats(b, m.daemon, ids, 16)
			<-second
		}
		elapsed := time.Since(begin).Seconds()
		b.ReportMetric((processorTime(b, pid)-daemonBefore).Seconds()/elapsed, "cores")
		b.ReportMetric((processorTime(b, enginePID(b))-engineBefore).Seconds()/elapsed, "engine-cores")
		b.ReportMetric(elapsed/rounds, "s-a-round")
		b.ReportMetric(float64(late), "late")
		now, _ := wireMemory(b, pid)
		b.ReportMetric(float64(now)/(1<<20), "MiB-resident")
	}
	b.ReportMetric(0, "ns/op")
}

// pollStats asks for the statistics of each service, by so many clients at a time, and returns how
// many the engine did not have in time.
func pollStats(b *testing.B, d *daemon, ids []string, clients int) (late int64) {
	var group sync.WaitGroup
	var count atomic.Int64
	turn := make(chan struct{}, clients)
	for _, id := range ids {
		turn <- struct{}{}
		group.Go(func() {
			defer func() { <-turn }()
			response, err := d.client.Do(d.request(b, "GET", "/service/"+id+"/stats", nil))
			if err != nil {
				b.Error(err)
				return
			}
			defer response.Body.Close()
			switch body, err := io.ReadAll(response.Body); {
			case response.StatusCode == http.StatusGatewayTimeout:
				count.Add(1)
			case response.StatusCode != http.StatusOK || err != nil:
				b.Errorf("%d %s %v", response.StatusCode, body, err)
			}
		})
	}
	group.Wait()
	return count.Load()
}

// BenchmarkWatched polls the statistics of 500 services once a second. Their engine is one that only sends
// frames: a real one with so many needs more than one machine.
func BenchmarkWatched(b *testing.B) {
	e := newFakeEngine(b)
	d, pid := wireProcess(b, e.host())
	frame := `{"read":"2022-05-08T19:50:43Z","preread":"2022-05-08T19:50:42Z","pad":"` +
		strings.Repeat("x", 2500) + `"}` + "\n"
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/stats") {
			return false
		}
		for second := time.Tick(time.Second); r.Context().Err() == nil; <-second {
			io.WriteString(w, frame)
			w.(http.Flusher).Flush()
		}
		return true
	})
	var ids []string
	for i := range 500 {
		id := fmt.Sprintf("service-%d", i)
		record := fmt.Sprintf(`{"params":{"id":%q},"revision":"1"}`, id)
		must(b, os.WriteFile(filepath.Join(d.binds, recordDir, id), []byte(record), 0o600))
		e.addForeign(id, map[string]string{labelService: id, labelBinds: d.binds, labelRevision: "1"},
			filepath.Join(d.binds, id))
		ids = append(ids, id)
	}
	d.client.Transport.(*http.Transport).MaxIdleConnsPerHost = 64
	pollStats(b, d, ids, 64)
	for b.Loop() {
		before, begin := processorTime(b, pid), time.Now()
		second := time.Tick(time.Second)
		for range 10 {
			pollStats(b, d, ids, 16)
			<-second
		}
		elapsed := time.Since(begin).Seconds()
		b.ReportMetric((processorTime(b, pid)-before).Seconds()/elapsed, "cores")
		b.ReportMetric(elapsed/10, "s-a-round")
		now, _ := wireMemory(b, pid)
		b.ReportMetric(float64(now)/(1<<20), "MiB-resident")
	}
	b.ReportMetric(0, "ns/op")
}
