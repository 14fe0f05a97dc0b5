//go:build integration

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// consoleRun starts a service with the probe in a mode, and follows what it prints.
func (m *machine) consoleRun(t *testing.T, mode, extra string) (id string, l logStream) {
	t.Helper()
	id = m.create(t, fmt.Sprintf(`"cmd":["/probe",%q,"/data","40000"],%s`, mode, extra))
	m.ctl(t, id, "start")
	return id, logsOpen(t, m.daemon, "/service/"+id+"/logs?follow=true")
}

// recorded returns what a service in the mode "record" has read.
func (m *machine) recorded(t testing.TB, id string) string {
	text, err := os.ReadFile(filepath.Join(m.binds, id, "stdin"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(text)
}

// wantRecorded waits until a service has read as much as the text, and compares.
func (m *machine) wantRecorded(t testing.TB, id, text string) {
	t.Helper()
	waitFor(t, "what the service reads", func() bool { return len(m.recorded(t, id)) >= len(text) })
	if got := m.recorded(t, id); got != text {
		t.Fatalf("the service has read %d bytes, ending with %q, of %d, ending with %q", len(got), consoleTail(got), len(text), consoleTail(text))
	}
}

func (m *machine) stdin(t testing.TB, id, text string) answer {
	t.Helper()
	return m.do(t, "POST", "/service/"+id+"/stdin", text)
}

func TestShellOnATTYIsDrivenThroughTheConsole(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id, l := m.consoleRun(t, "shell", `"tty":true`)
	l.wait(t, "ready")
	r := stdinOpen(t, m.daemon, id)
	for i := range 20 {
		fmt.Fprintf(r, "say word %d\r", i)
		l.wait(t, fmt.Sprintf("<word %d>\r\n", i))
	}
	for _, size := range []string{"24x80", "1x1", "65535x65535", "50x132"} {
		rows, cols, _ := strings.Cut(size, "x")
		m.do(t, "POST", "/service/"+id+"/tty", fmt.Sprintf(`{"rows":%s,"cols":%s}`, rows, cols)).want(t, 204)
		l.wait(t, "size "+size+"\r\n")
	}
	io.WriteString(r, "sayx\x7f one\x15say two\n") // the tty edits the line
	l.wait(t, "<two>\r\n")
	io.WriteString(r, "exit\n")
	if err := l.end(t); err != nil {
		t.Errorf("the logs ended with %v", err)
	}
	io.WriteString(r, "say nothing\n")
	if a := r.answer(t); a.status != 409 {
		t.Errorf("after its end: %d %s", a.status, a.body)
	}
	m.do(t, "POST", "/service/"+id+"/tty", `{"rows":24,"cols":80}`).want(t, 409)
	if a := m.do(t, "GET", "/service/"+id+"/logs", "").want(t, 200); a.body != l.text.String() {
		t.Errorf("logs %q, followed %q", a.body, l.text)
	}
}

// A prompt ends no line: the engine logs it with the rest of that.
func TestPromptComesWithTheRestOfItsLine(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for _, tty := range []bool{true, false} {
		id, l := m.consoleRun(t, "shell", fmt.Sprintf(`"tty":%v`, tty))
		l.wait(t, "ready")
		m.stdin(t, id, "prompt\n").want(t, 204)
		m.stdin(t, id, "say the rest\n").want(t, 204)
		l.wait(t, "<the rest>")
		if text := l.text.String(); !strings.Contains(text, "$ ") {
			t.Errorf("%q has no prompt", text)
		}
	}
}

func TestOutputsOfAServiceWithoutTTY(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id, l := m.consoleRun(t, "both", `"tty":false`)
	var out, errs []string
	for i := range 500 {
		out, errs = append(out, fmt.Sprintf("out %d", i)), append(errs, fmt.Sprintf("err %d", i))
	}
	// The engine keeps what ends no line until more comes or the service ends, and does not
	// always send that to who follows.
	l.wait(t, "out 499\n")
	l.wait(t, "err 499\n")
	wantLines := func(query string, prefix string, want []string) {
		t.Helper()
		a := m.do(t, "GET", "/service/"+id+"/logs"+query, "").want(t, 200)
		var got []string
		for line := range strings.Lines(a.body) {
			if strings.HasPrefix(line, prefix) {
				got = append(got, strings.TrimSuffix(line, "\n"))
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("logs%s: %d lines with %q, want %d; last %q", query, len(got), prefix, len(want), got[max(0, len(got)-1):])
		}
	}
	wantLines("", "out", out)
	wantLines("", "err", errs)
	wantLines("?stderr=false", "", out)
	wantLines("?stdout=false", "", errs)
	wantLines("?tail=0", "", nil)
	if a := m.do(t, "GET", "/service/"+id+"/logs?tail=3", "").want(t, 200); strings.Count(a.body, "\n") != 3 {
		t.Errorf("logs?tail=3: %q", a.body)
	}
	wantLines("?tail=999999999", "out", out)
	wantLines("?until=1", "", nil)
	wantLines("?since=9999999999", "", nil)
	wantLines("?since=0&until=9999999999.999999999", "out", out)
	m.do(t, "GET", "/service/"+id+"/logs?stdout=false&stderr=false", "").want(t, 400)

	stamped := m.do(t, "GET", "/service/"+id+"/logs?timestamps=true&stderr=false", "").want(t, 200)
	lines := strings.Split(strings.TrimSpace(stamped.body), "\n")
	stamp, text, _ := strings.Cut(lines[250], " ")
	at, err := time.Parse(time.RFC3339Nano, stamp)
	if err != nil || text != "out 250" {
		t.Fatalf("line %q: %v", lines[250], err)
	}
	since := fmt.Sprintf("%d.%09d", at.Unix(), at.Nanosecond())
	after := m.do(t, "GET", "/service/"+id+"/logs?stderr=false&since="+since, "").want(t, 200).body
	if !strings.HasPrefix(after, "out 250\n") || !strings.HasSuffix(after, "out 499\n") {
		t.Errorf("logs since %s: %.40q", since, after)
	}
	before := m.do(t, "GET", "/service/"+id+"/logs?stderr=false&until="+since, "").want(t, 200).body
	if !strings.HasPrefix(before, "out 0\n") || !strings.HasSuffix(before, "out 250\n") {
		t.Errorf("logs until %s: ends with %q", since, consoleTail(before))
	}

	m.ctl(t, id, "kill")
	if err := l.end(t); err != nil {
		t.Error(err)
	}
	follow := m.do(t, "GET", "/service/"+id+"/logs?follow=true", "").want(t, 200)
	if !strings.Contains(follow.body, "the end of out") || !strings.Contains(follow.body, "the end of err") {
		t.Errorf("the last words are not in the logs: %q", consoleTail(follow.body))
	}
	if follow.body != m.do(t, "GET", "/service/"+id+"/logs", "").want(t, 200).body {
		t.Error("the logs of a stopped service differ if they are followed")
	}
}

func TestEveryByteReachesAProgram(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for _, tty := range []bool{true, false} {
		t.Run(fmt.Sprintf("tty %v", tty), func(t *testing.T) {
			t.Parallel()
			id, l := m.consoleRun(t, "record", fmt.Sprintf(`"tty":%v`, tty))
			l.wait(t, "ready")
			want := ""
			for i, chunk := range consoleBytes() {
				m.stdin(t, id, chunk).want(t, 204)
				want += chunk
				if i%50 == 0 {
					m.wantRecorded(t, id, want)
				}
			}
			m.wantRecorded(t, id, want)
			text := make([]byte, 10<<20)
			mathrand.NewChaCha8([32]byte{3}).Read(text)
			m.stdin(t, id, string(text)).want(t, 204)
			m.wantRecorded(t, id, want+string(text))
		})
	}
}

func TestWritersOfOneServiceNeverTearEachOthersChunks(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for _, tty := range []bool{true, false} {
		for _, writers := range []int{2, 10} {
			t.Run(fmt.Sprintf("tty %v, %d writers", tty, writers), func(t *testing.T) {
				t.Parallel()
				id, l := m.consoleRun(t, "record", fmt.Sprintf(`"tty":%v`, tty))
				l.wait(t, "ready")
				var all sync.WaitGroup
				for writer := range writers {
					all.Go(func() {
						for number := range 20 {
							m.stdin(t, id, consoleRecord(writer, number, 1500)).want(t, 204)
						}
					})
				}
				all.Wait()
				waitFor(t, "all records", func() bool { return len(m.recorded(t, id)) >= writers*20*1512 })
				if records := consoleRecords(t, m.recorded(t, id)); records != writers*20 {
					t.Errorf("%d records", records)
				}
			})
		}
	}
}

func TestFollowEndsOrderlyWithEveryRun(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for name, end := range map[string]func(id string){
		"stop":                             func(id string) { m.ctl(t, id, "stop") },
		"kill":                             func(id string) { m.ctl(t, id, "kill") },
		"restart":                          func(id string) { m.ctl(t, id, "restart") },
		"restart with another environment": func(id string) { m.setEnv(t, id, `{"A":"1"}`); m.ctl(t, id, "restart") },
		"exit": func(id string) {
			if a := m.stdin(t, id, "exit\n"); a.status != 409 { // it was too fast
				a.want(t, 204)
			}
		},
		"delete": func(id string) { m.do(t, "DELETE", "/service/"+id, "").want(t, 204) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mode := map[bool]string{true: "shell", false: "deaf"}[name == "exit"]
			id, l := m.consoleRun(t, mode, `"tty":false`)
			for n := range 8 {
				l.wait(t, "ready\n")
				var many []logStream
				for range 5 {
					many = append(many, logsOpen(t, m.daemon, "/service/"+id+"/logs?follow=true&tail=1"))
				}
				end(id)
				for _, l := range append(many, l) {
					if err := l.end(t); err != nil {
						t.Errorf("round %d: ended with %v", n, err)
					}
				}
				if name == "delete" {
					m.do(t, "GET", "/service/"+id+"/logs", "").want(t, 404)
					return
				}
				m.ctl(t, id, "start")
				l = logsOpen(t, m.daemon, "/service/"+id+"/logs?follow=true&tail=1")
			}
		})
	}
}

func TestFollowOfARunningServiceIsBrokenOffWhenTheDaemonEnds(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id, l := m.consoleRun(t, "record", `"tty":true`)
	l.wait(t, "ready")
	r := stdinOpen(t, m.daemon, id)
	io.WriteString(r, "x")
	m.wantRecorded(t, id, "x")
	if err := m.stop(); err != nil {
		t.Error(err)
	}
	if err := l.end(t); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("the follow ended with %v", err)
	}
	if a := r.answer(t); a.status != 503 && a.status != 0 {
		t.Errorf("stdin: %d %s", a.status, a.body)
	}
}

func TestServiceThatDoesNotReadItsStdin(t *testing.T) {
	t.Parallel()
	m := newMachine(t, func(c *config) { c.waits.write = 2 * time.Second })
	for _, tty := range []bool{true, false} {
		t.Run(fmt.Sprintf("tty %v", tty), func(t *testing.T) {
			t.Parallel()
			id, l := m.consoleRun(t, "deaf", fmt.Sprintf(`"tty":%v`, tty))
			l.wait(t, "ready")
			other, l2 := m.consoleRun(t, "record", `"tty":false`)
			l2.wait(t, "ready")
			sent := crowdSend(t, m.daemon, "POST", "/service/"+id+"/stdin", strings.Repeat("x", 1<<20))
			for range 5 {
				m.stdin(t, other, "x").want(t, 204)
			}
			(<-sent).want(t, 504)
			m.wantRecorded(t, other, "xxxxx")
			m.ctl(t, id, "kill")
			m.stdin(t, id, "x").want(t, 409)
		})
	}
}

// A service that ends has not read what was on its way.
func TestStdinOfAServiceThatEndsWithinAChunk(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for name, end := range map[string]func(id string){
		"kill":    func(id string) { m.ctl(t, id, "kill") },
		"stop":    func(id string) { m.ctl(t, id, "stop") },
		"restart": func(id string) { m.ctl(t, id, "restart") },
		"delete":  func(id string) { m.do(t, "DELETE", "/service/"+id, "").want(t, 204) },
	} {
		for _, tty := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, tty %v", name, tty), func(t *testing.T) {
				t.Parallel()
				id, l := m.consoleRun(t, "deaf", fmt.Sprintf(`"tty":%v`, tty))
				l.wait(t, "ready")
				// Chunk by chunk, until one is not taken: the last of its request.
				for n := 0; ; n++ {
					sent := crowdSend(t, m.daemon, "POST", "/service/"+id+"/stdin", strings.Repeat("x", 30_000))
					select {
					case a := <-sent:
						a.want(t, 204)
						continue
					case <-time.After(2 * time.Second):
					}
					end(id)
					if a := <-sent; a.status != 409 && !(a.status == 404 && name == "delete") {
						t.Errorf("after %d chunks, answered %d %s", n, a.status, a.body)
					}
					return
				}
			})
		}
	}
}

func TestConsoleOfServicesInEveryState(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id := m.create(t, `"cmd":["/probe","shell","/data"]`)
	const size = `{"rows":24,"cols":80}`
	for _, query := range []string{"", "?follow=true", "?tail=5&follow=1"} {
		if a := m.do(t, "GET", "/service/"+id+"/logs"+query, "").want(t, 200); a.body != "" {
			t.Errorf("logs%s of a service that never ran: %q", query, a.body)
		}
	}
	m.stdin(t, id, "x").want(t, 409)
	m.do(t, "POST", "/service/"+id+"/tty", size).want(t, 409)
	m.ctl(t, id, "start")
	if err := m.engine.ContainerPause(context.Background(), id); err != nil {
		t.Fatal(err)
	}
	m.stdin(t, id, "x").want(t, 409)
	m.do(t, "GET", "/service/"+id+"/logs", "").want(t, 200)
	if err := m.engine.ContainerUnpause(context.Background(), id); err != nil {
		t.Fatal(err)
	}
	shut := m.create(t, `"cmd":["/probe","deaf","/data"],"open_stdin":false,"tty":false`)
	m.ctl(t, shut, "start")
	m.stdin(t, shut, "x").want(t, 409)
	m.do(t, "POST", "/service/"+shut+"/tty", size).want(t, 409)
}

// Few enough that the engine begins no other file: then its follow repeats lines.
func TestLogsAreTheEngines(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for _, tty := range []bool{true, false} {
		id, l := m.consoleRun(t, "flood", fmt.Sprintf(`"tty":%v`, tty))
		last := fmt.Sprintf("%099d", 39_999)
		waitFor(t, "the last line", func() bool { return strings.Contains(l.text.tail(), last) })
		var want bytes.Buffer
		end := map[bool]string{true: "\r\n", false: "\n"}[tty]
		w := bufio.NewWriter(&want)
		for i := range 40_000 {
			fmt.Fprintf(w, "%099d%s", i, end)
		}
		w.Flush()
		if l.text.String() != want.String() {
			t.Errorf("tty %v: followed %d bytes, want %d", tty, len(l.text.String()), want.Len())
		}
		if a := m.do(t, "GET", "/service/"+id+"/logs", "").want(t, http.StatusOK); a.body != want.String() {
			t.Errorf("tty %v: %d bytes, want %d", tty, len(a.body), want.Len())
		}
	}
}

// tail returns what was written last.
func (b *syncBuffer) tail() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	text := b.text.Bytes()
	return string(text[max(0, len(text)-300):])
}

// The console of the documents, on Node.js: at which nobody types for longer than the daemon waits for a header.
func TestConsoleOfTheDocumentsOnNode(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("node"); err != nil {
		t.Skip("there is no Node.js here")
	}
	m := newMachine(t, nil)
	id, _ := m.consoleRun(t, "shell", "")
	console := exec.CommandContext(t.Context(), "node", "docs/console.mjs", m.url, id)
	console.Env = append(os.Environ(), "COREKEY="+m.key)
	var out, complaints syncBuffer
	console.Stdout, console.Stderr = &out, &complaints
	keys, err := console.StdinPipe()
	if err = cmp.Or(err, console.Start()); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- console.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("it ended while nobody typed: %v\n%s%s", err, &out, &complaints)
	case <-time.After(15 * time.Second):
	}
	io.WriteString(keys, "say hello\n")
	waitFor(t, "the answer", func() bool { return strings.Contains(out.String(), "<hello>") })
	io.WriteString(keys, "exit\n")
	if err := <-ended; err != nil {
		t.Errorf("it ended with %v\n%s%s", err, &out, &complaints)
	}
	refused, err := exec.Command("node", "docs/console.mjs", m.url, "nobody").CombinedOutput()
	if err == nil || !strings.Contains(string(refused), "core authorization") {
		t.Errorf("without the key: %v, %s", err, refused)
	}
}
