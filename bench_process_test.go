//go:build integration

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/client"
)

var growth = flag.Int("growth", 100, "how many services BenchmarkGrowth runs at the end")

// These benchmarks watch the daemon as a process of its own, as it is shipped.

// newProcess starts a daemon and gives it the probe's image.
func newProcess(b *testing.B, args ...string) (m *machine, pid int) {
	b.Helper()
	engine, err := client.NewClientWithOpts(client.FromEnv, client.WithAPIVersionNegotiation())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { engine.Close() })
	m = &machine{engine: engine}
	m.daemon, pid = wireProcess(b, client.DefaultDockerHost, args...)
	m.client.Timeout = 0
	m.client.Transport.(*http.Transport).MaxIdleConnsPerHost = 64
	m.image = m.importImage(b, string(imageOf(b, imageFile("probe", buildProbe(b)))))
	m.cleanUp(b, m.binds, m.image)
	return m, pid
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
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	for _, field := range strings.Fields(rest)[11:13] { // utime and stime of proc_pid_stat(5), in hundredths of a second
		ticks, err := strconv.Atoi(field)
		if err != nil {
			b.Fatal(err)
		}
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
	if err != nil {
		b.Fatal(err)
	}
	info, err := program.Stat()
	if err != nil {
		b.Fatal(err)
	}
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
		err = archive.WriteHeader(&tar.Header{Name: fmt.Sprintf("directory-%d/file-%d", i/100, i), Mode: 0o644, Size: 100})
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
		source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(archive.Bytes()) }))
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
	for _, count := range []int{1, 10, 100, *growth} {
		for len(ids) < count {
			ids = append(ids, m.create(b, ""))
			m.ctl(b, ids[len(ids)-1], "start")
		}
		b.Run(fmt.Sprint(len(ids)), func(b *testing.B) { growthOf(b, m, pid, engine, ids) })
	}
}

func growthOf(b *testing.B, m *machine, pid int, engine *http.Client, ids []string) {
	allStats := func(clients int) { pollStats(b, m.daemon, ids, clients) }
	median := func(c *http.Client, request func() *http.Request) float64 {
		each, _ := latencies(1, 20, func() { fetchAll(b, c, request()) })
		return float64(each[len(each)/2].Microseconds())
	}
	ask := func(path string) float64 {
		return median(m.client, func() *http.Request { return m.request(b, "GET", path, nil) })
	}
	askEngine := func(path string) float64 {
		return median(engine, func() *http.Request { r, _ := http.NewRequest("GET", "http://engine"+path, nil); return r })
	}
	const rounds = 10
	for b.Loop() {
		b.ReportMetric(ask("/service"), "µs-list")
		b.ReportMetric(askEngine("/containers/json?all=1"), "µs-engine-list")
		b.ReportMetric(ask("/service/"+ids[0]), "µs-inspect")
		b.ReportMetric(askEngine("/containers/"+ids[0]+"/json"), "µs-engine-inspect")
		allStats(len(ids)) // opens the engine's streams
		b.ReportMetric(ask("/service/"+ids[0]+"/stats"), "µs-stats")
		daemonBefore, engineBefore, begin := processorTime(b, pid), processorTime(b, enginePID(b)), time.Now()
		second := time.Tick(time.Second)
		for range rounds {
			allStats(16)
			<-second
		}
		elapsed := time.Since(begin).Seconds() // more than rounds where the machine cannot keep up
		b.ReportMetric((processorTime(b, pid)-daemonBefore).Seconds()/elapsed, "cores")
		b.ReportMetric((processorTime(b, enginePID(b))-engineBefore).Seconds()/elapsed, "engine-cores")
		b.ReportMetric(elapsed/rounds, "s-a-round")
		now, _ := wireMemory(b, pid)
		b.ReportMetric(float64(now)/(1<<20), "MiB-resident")
	}
	b.ReportMetric(0, "ns/op")
}

// pollStats asks for the statistics of each service, by so many clients at a time.
func pollStats(b *testing.B, d *daemon, ids []string, clients int) {
	var group sync.WaitGroup
	turn := make(chan struct{}, clients)
	for _, id := range ids {
		turn <- struct{}{}
		group.Go(func() { fetchAll(b, d.client, d.request(b, "GET", "/service/"+id+"/stats", nil)); <-turn })
	}
	group.Wait()
}

// BenchmarkWatched polls the statistics of many services once a second. Their engine is
// one that only sends frames: a real one with so many needs more than one machine.
func BenchmarkWatched(b *testing.B) {
	for _, count := range []int{500, 10_000} {
		b.Run(fmt.Sprint(count), func(b *testing.B) {
			var binds string
			frame := `{"read":"2022-05-08T19:50:43Z","preread":"2022-05-08T19:50:42Z","pad":"` + strings.Repeat("x", 2500) + `"}` + "\n"
			socket := filepath.Join(b.TempDir(), "s")
			listener, err := net.Listen("unix", socket)
			if err != nil {
				b.Fatal(err)
			}
			engine := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, call, _ := strings.Cut(r.URL.Path, "/containers/")
				id, call, _ := strings.Cut(call, "/")
				switch {
				case call == "json":
					fmt.Fprintf(w, `{"Id":%q,"Name":%q,"State":{"Running":true},"Config":{"Labels":{%q:%q,%q:%q}}}`,
						id, "/"+id, labelService, id, labelBinds, binds)
				case call == "stats":
					for second := time.Tick(time.Second); r.Context().Err() == nil; <-second {
						io.WriteString(w, frame)
						w.(http.Flusher).Flush()
					}
				case id == "json":
					io.WriteString(w, "[]")
				default:
					w.Header().Set("Api-Version", "1.41")
				}
			})}
			go engine.Serve(listener) // ends with Close
			defer engine.Close()
			d, pid := wireProcess(b, "unix://"+socket)
			binds = d.binds
			d.client.Transport.(*http.Transport).MaxIdleConnsPerHost = 64
			ids := make([]string, count)
			for i := range ids {
				ids[i] = fmt.Sprintf("service-%d", i)
			}
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
		})
	}
}
